-- A side that slept through a flip: standby at the truth's epoch, whatever it was. Servers 13+.
update pgflip.state
   set state = 'standby', epoch = $1, go_to = $2, changed_at = clock_timestamp()
 where epoch < $1
