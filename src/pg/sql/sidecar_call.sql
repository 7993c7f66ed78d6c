-- The call that other sidecars ($1: this one) are to follow now. None: there is none, it is over, or its caller has died
-- or fallen asleep (one that lives says something every second). Servers 13+.
select c.n, c.epoch, c.step, c.target, c.drain_ms
  from pgflip.call c
  join pg_stat_activity a on a.pid = c.pid and a.backend_start = c.backend_start
 where c.step <> 'over' and c.caller <> $1
   and (a.state = 'active' or a.state_change > clock_timestamp() - interval '10 seconds')
