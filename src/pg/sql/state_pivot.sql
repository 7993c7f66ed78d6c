-- Target: standby -> active at the next epoch, unless this attempt has been burnt. One row if it has happened. Sessions that
-- listen on a connection made ahead are told in the same commit: what was notified here before it is not theirs, what
-- comes after it is. Servers 13+.
with pivot as (
    update pgflip.state
       set state = 'active', epoch = $1 + 1, attempt = greatest(attempt, $2), go_to = '', changed_at = clock_timestamp()
     where epoch = $1 and state = 'standby' and burnt < $2
    returning epoch)
select pg_notify('pgflip_active', epoch::text) from pivot
