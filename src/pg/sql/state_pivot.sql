-- Target: standby -> active at the next epoch, unless this attempt has been burnt. Servers 13+.
update pgflip.state
   set state = 'active', epoch = $1 + 1, attempt = greatest(attempt, $2), go_to = '', changed_at = clock_timestamp()
 where epoch = $1 and state = 'standby' and burnt < $2
