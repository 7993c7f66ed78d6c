-- Every column of every published table (tables_to_publish.sql) as both sides must have it: name, type, whether it is
-- generated. Servers 13 and later.
select n.nspname as schema, c.relname as name, a.attname::text as column,
       format_type(a.atttypid, a.atttypmod) as type, a.attgenerated <> '' as generated
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
where c.relkind = 'r'
  and c.relpersistence = 'p'
  and c.oid >= 16384
  and n.nspname not in ('pg_catalog', 'information_schema', 'pgflip')
  and n.nspname !~ '^pg_(toast|temp)'
  and not exists (select from pg_depend d
                  where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
order by 1, 2, a.attnum
