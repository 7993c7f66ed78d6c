-- The next step ($2) of call $1, with $3 ms to drain: no row if somebody else calls by now, or if others are to hold and
-- the epoch has moved on. Servers 13+.
update pgflip.call c
   set step = $2, drain_ms = $3
 where c.n = $1
   and ($2 = 'over' or exists (select from pgflip.state s where s.epoch = c.epoch and s.state <> 'standby'))
