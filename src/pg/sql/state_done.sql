-- Source, after the pivot: standby at the next epoch. It stays fenced without a break. Servers 13+.
update pgflip.state
   set state = 'standby', epoch = $1 + 1, attempt = greatest(attempt, $2), go_to = $3, changed_at = clock_timestamp()
 where epoch = $1 and state in ('fenced', 'committing') and attempt = $2
    or epoch = $1 + 1 and state = 'standby'
