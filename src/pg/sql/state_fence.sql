-- Source: active -> fenced(id). The caller holds pgflip.gate in EXCLUSIVE mode: no writer is in flight. Servers 13+.
update pgflip.state
   set state = 'fenced', attempt = $2, go_to = $3, changed_at = clock_timestamp()
 where epoch = $1 and state = 'active' and attempt < $2
