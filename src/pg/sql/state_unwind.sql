-- Source: active again at the same epoch. From active it only raises `attempt`, so that a fence of an attempt up to
-- this one that is still on its way changes nothing. $3: the attempt has been burnt. Servers 13+.
update pgflip.state
   set state = 'active', attempt = greatest(attempt, $2), go_to = '', changed_at = clock_timestamp()
 where epoch = $1
   and (   state = 'active'
        or state = 'fenced' and attempt <= $2
        or state = 'committing' and attempt <= $2 and $3)
