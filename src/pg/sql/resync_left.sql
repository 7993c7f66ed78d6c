-- Ends the sessions of pgflip's own of this name ($1) in this database. Servers 13 and later.
select pg_catalog.pg_terminate_backend(a.pid)
from pg_catalog.pg_stat_activity a
where a.application_name = $1 and a.datname = pg_catalog.current_database() and a.usename = current_user
  and a.pid <> pg_catalog.pg_backend_pid()
