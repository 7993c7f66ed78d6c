-- Types whose OIDs drivers keep: enums, ranges, composites, domains, those of extensions, and their arrays; not the row
-- types of tables. With what kind each is, and a few of the columns and functions by which clients meet it, or its array.
-- (Of a domain a client sees its base type, but for arrays of it.) Servers 13 and later.
with kept as materialized (
    select t.oid, t.typarray, format_type(t.oid, null) as name,
           case t.typtype when 'e' then 'enum' when 'c' then 'composite' when 'r' then 'range' when 'm' then 'range'
                          when 'd' then 'domain' else 'base' end as kind
    from pg_type t
    join pg_namespace n on n.oid = t.typnamespace
    left join pg_class c on c.oid = t.typrelid
    where t.oid >= 16384
      and n.nspname not in ('pgflip', 'pg_toast')
      and n.nspname !~ '^pg_temp'
      and (t.typrelid = 0 or c.relkind = 'c')
      and not (t.typelem <> 0 and t.typcategory = 'A')
), columns as materialized (
    -- Through domains to what a client sees.
    select distinct case b.typtype when 'd' then b.typbasetype else b.oid end as type, r.oid::regclass::text || '.' || quote_ident(a.attname) as place
    from pg_attribute a
    join pg_class r on r.oid = a.attrelid and r.relkind in ('r', 'p', 'v', 'm', 'f', 'c') and r.oid >= 16384 and not r.relispartition
    join pg_type b on b.oid = a.atttypid
    where a.attnum > 0 and not a.attisdropped and b.oid >= 16384
      and r.relnamespace <> coalesce(to_regnamespace('pgflip')::oid, 0)
), arguments as materialized (
    select p.oid, p.oid::regproc::text || '()' as place, u.type
    from pg_proc p, unnest(p.prorettype || coalesce(p.proallargtypes, p.proargtypes::oid[])) u (type)
    where p.oid >= 16384 and u.type >= 16384
      and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype in ('e', 'i'))
)
select k.oid, coalesce(k.typarray, 0) as array_oid, k.name, k.kind,
       array(select x.place from (select c.place from columns c where c.type in (k.oid, nullif(k.typarray, 0))
                                  union
                                  select a.place from arguments a where a.type in (k.oid, nullif(k.typarray, 0))) x
             order by 1 limit 3) as places
from kept k
order by k.name
