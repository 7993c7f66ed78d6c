-- Cancels what these sessions (by pid) are at, if they are pgflip's. Servers 13 and later.
select pg_catalog.pg_cancel_backend(a.pid)
from pg_catalog.pg_stat_activity a
where a.pid = any ($1) and a.application_name like 'pgflip: %' and a.state <> 'idle'
