-- What sessions have in their temporary schemas, as far as it is seen from outside, without waiting for anybody's lock.
-- Behind temporary_relations.sql. $1: the schemas. Columns: namespace, name, bytes (null:
-- not known), obstacle (why it can't be moved; null: as far as is seen it can). Servers 16 and later.
select t.relnamespace as namespace, t.relname::text as name, t.bytes, t.obstacle from temporary t
union all
select p.pronamespace, p.proname || '()', 0, 'is a function' from pg_proc p where p.pronamespace = any ($1)
union all
select y.typnamespace, y.typname::text, 0, 'is a type'
  from pg_type y where y.typnamespace = any ($1) and y.typrelid = 0 and y.typelem = 0
order by 1, 2
