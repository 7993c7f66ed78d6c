-- Ends these sessions ($1, pids) with all that was sent to them, if their application_name is one of $2: by now such a number may be
-- another session's. No row: they have gone. Servers 13 and later.
select pg_catalog.pg_terminate_backend(a.pid)
from pg_catalog.pg_stat_activity a
where a.pid = any ($1) and a.application_name = any ($2)
