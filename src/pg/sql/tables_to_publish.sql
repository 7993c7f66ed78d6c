-- The tables a link carries: ordinary and permanent, partitions' leaves included; not the system's, not an extension's,
-- not pgflip's own. Servers 13 and later.
select c.oid, n.nspname as schema, c.relname as name
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where c.relkind = 'r'
  and c.relpersistence = 'p'
  and c.oid >= 16384
  and n.nspname not in ('pg_catalog', 'information_schema', 'pgflip')
  and n.nspname !~ '^pg_(toast|temp)'
  and not exists (select from pg_depend d
                  where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
order by c.oid
