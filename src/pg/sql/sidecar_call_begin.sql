-- Begins a call: $1 epoch, $2 target, $3 caller. Answers its number, which no later call has; no row if this side is not
-- active at that epoch any more, which a caller that has slept does not know. Rows of sidecars that have been gone for an
-- hour go. Servers 13+.
with gone as (delete from pgflip.sidecar where seen_at < clock_timestamp() - interval '1 hour')
update pgflip.call c
   set n = c.n + 1, epoch = $1, step = 'prepare', target = $2, caller = $3, pid = a.pid, backend_start = a.backend_start
  from pg_stat_activity a
 where a.pid = pg_backend_pid()
   and exists (select from pgflip.state s where s.epoch = $1 and s.state = 'active')
returning c.n
