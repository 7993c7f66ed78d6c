-- Target: attempts up to this one can never pivot. The UPDATE waits for a pivot in flight; no row changed means that it
-- has been committed. Servers 13+.
update pgflip.state
   set burnt = greatest(burnt, $2), attempt = greatest(attempt, $2), changed_at = clock_timestamp()
 where epoch = $1 and state = 'standby'
