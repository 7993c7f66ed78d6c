-- Ends session $1, if its application_name is $2: by now that number may be another session's. No row: it has gone. Servers 13 and
-- later.
select pg_catalog.pg_terminate_backend(a.pid)
from pg_catalog.pg_stat_activity a
where a.pid = $1 and a.application_name = $2
