-- The other sidecars (not $1) that are alive, with what they have answered to step $3 of call $2: answered is false as
-- long as they have not. A session that is gone or has been silent for ten seconds is none. Servers 13+.
select s.id, s.name, s.epoch, s.sessions, s.elsewhere, s.call = $2 and s.step = $3 as answered, s.ready, s.obstacles
  from pgflip.sidecar s
  join pg_stat_activity a on a.pid = s.pid and a.backend_start = s.backend_start
 where s.id <> $1 and s.seen_at > clock_timestamp() - interval '10 seconds'
 order by s.name
