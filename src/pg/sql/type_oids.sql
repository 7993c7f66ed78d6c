-- Types whose OIDs drivers keep: enums, ranges, domains, composites, those of extensions, and their arrays. Not the row
-- types of tables. Servers 13 and later.
select t.oid, format_type(t.oid, null) as name
from pg_type t
join pg_namespace n on n.oid = t.typnamespace
left join pg_class c on c.oid = t.typrelid
left join pg_type e on e.oid = t.typelem
left join pg_class ec on ec.oid = e.typrelid
where t.oid >= 16384
  and n.nspname not in ('pgflip', 'pg_toast')
  and n.nspname !~ '^pg_temp'
  and (t.typrelid = 0 or c.relkind = 'c')
  and (t.typcategory <> 'A' or e.typrelid = 0 or ec.relkind = 'c')
