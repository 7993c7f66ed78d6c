-- Temporary schemas of sessions. $1: pids of server processes in this database. Before 16 their numbers were not those of any
-- view. Columns: namespace (oid), schema, pid, files (who asks
-- may read the sizes of files). Servers 16 and later.
select n.oid as namespace, n.nspname::text as schema, pg_stat_get_backend_pid(id) as pid,
       has_function_privilege('pg_stat_file(text, boolean)', 'execute') as files
  from pg_stat_get_backend_idset() id
  join pg_namespace n on n.nspname = 'pg_temp_' || id
 where pg_stat_get_backend_pid(id) = any ($1)
