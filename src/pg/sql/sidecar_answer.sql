-- What this sidecar ($1) answers to step $3 of call $2. Servers 13+.
update pgflip.sidecar set call = $2, step = $3, ready = $4, obstacles = $5 where id = $1
