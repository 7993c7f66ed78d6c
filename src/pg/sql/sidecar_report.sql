-- This sidecar's row: $1 id, $2 name, $3 epoch, $4 sessions, $5 of them on the other side. Servers 13+.
insert into pgflip.sidecar as s (id, name, pid, backend_start, epoch, sessions, elsewhere)
select $1, $2, a.pid, a.backend_start, $3, $4, $5 from pg_stat_activity a where a.pid = pg_backend_pid()
on conflict (id) do update
   set name = excluded.name, pid = excluded.pid, backend_start = excluded.backend_start, seen_at = clock_timestamp(),
       epoch = excluded.epoch, sessions = excluded.sessions, elsewhere = excluded.elsewhere
