-- Temporary schemas of sessions, and functions and types in them, which can't be moved; of the rest see
-- temporary_objects.sql. $1: pids of server processes in this database. Before 16 the numbers of temporary schemas were not
-- those of any view. Columns: pid, namespace (oid), schema, name (null: the schema itself). Servers 16 and later.
with temporary as (
    select pg_stat_get_backend_pid(id) as pid, n.oid, n.nspname
      from pg_stat_get_backend_idset() id
      join pg_namespace n on n.nspname = 'pg_temp_' || id
     where pg_stat_get_backend_pid(id) = any ($1))
select t.pid, t.oid as namespace, t.nspname::text as schema, null::text as name from temporary t
union all
select t.pid, t.oid, t.nspname::text, p.proname::text || '()'
  from temporary t join pg_proc p on p.pronamespace = t.oid
union all
select t.pid, t.oid, t.nspname::text, y.typname::text
  from temporary t join pg_type y on y.typnamespace = t.oid
 where y.typrelid = 0 and y.typelem = 0
order by 1, 3, 4
