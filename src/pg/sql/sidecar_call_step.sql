-- The next step ($2) of call $1, with $3 ms to drain: no row if somebody else calls by now. Servers 13+.
update pgflip.call set step = $2, drain_ms = $3 where n = $1
