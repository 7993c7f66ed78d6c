-- Ends these sessions (by pid) with all that was sent to them, if they are those that compare ($2: their application_names): by now
-- such a number may be another session's. Servers 13 and later.
select pg_catalog.pg_terminate_backend(a.pid)
from pg_catalog.pg_stat_activity a
where a.pid = any ($1) and a.application_name = any ($2)
