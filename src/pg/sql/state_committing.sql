-- Source, carrier: fenced(id) -> committing(id). From here on the pivot may have been committed. Servers 13+.
update pgflip.state
   set state = 'committing', changed_at = clock_timestamp()
 where epoch = $1 and state = 'fenced' and attempt = $2
