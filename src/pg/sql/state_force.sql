-- By force: this side, fenced as source of an attempt whose target can't be asked, is active again. Two epochs on, so that
-- it outranks the target even if the pivot has been committed there. Servers 13+.
update pgflip.state
   set state = 'active', epoch = $1 + 2, attempt = greatest(attempt, $2), go_to = '', changed_at = clock_timestamp()
 where epoch = $1 and state in ('fenced', 'committing') and attempt <= $2
