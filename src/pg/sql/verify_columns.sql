-- The columns of the tables in publication pgflip (its marker left out), one row each, with what comparing them needs. Of the key,
-- which is the replica identity's if that is an index, and else the primary key: the column's place in it, the operators that its
-- index compares with, whether PostgreSQL itself orders its type, and by which order: '' if all servers have the same one, a collation with its version, or NULL if that is not
-- known. Servers 13 and later: what the locale's column is called depends on the version. $1: whether sizes are measured, which waits
-- for whoever has a table locked against everybody; else every table may be as large as can be.
with collations as (
  select c.oid, c.provider, c.locale,
         case when c.provider = 'c' and c.locale in ('C', 'POSIX') then ''
              -- Of one that is not versioned nothing is known: NULL.
              else c.provider || ' ' || c.locale || ' ' || pg_catalog.pg_collation_actual_version(c.oid)
         end as sorts_by
  from (select c.oid, c.collprovider::text as provider,
               coalesce(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', c.collcollate::text) as locale
        from pg_catalog.pg_collation c
        where c.collencoding in (-1, (select d.encoding from pg_catalog.pg_database d
                                      where d.datname = pg_catalog.current_database()))) c
), database as (
  select case when d.provider = 'c' and d.locale in ('C', 'POSIX') then ''
              else (select min(c.sorts_by) from collations c where c.provider = d.provider and c.locale = d.locale)
         end as sorts_by
  from (select coalesce(to_jsonb(d) ->> 'datlocprovider', 'c') as provider,
               coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', d.datcollate::text) as locale
        from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()) d
), keys as (
  select distinct on (i.indrelid) i.*
  from pg_catalog.pg_index i
  join pg_catalog.pg_class c on c.oid = i.indrelid
  join pg_catalog.pg_class x on x.oid = i.indexrelid
  join pg_catalog.pg_am m on m.oid = x.relam and m.amname = 'btree'
  where i.indisvalid and i.indisunique and i.indimmediate and i.indpred is null and i.indexprs is null
    and (i.indisprimary or i.indisreplident and c.relreplident = 'i')
  order by i.indrelid, i.indisreplident and c.relreplident = 'i' desc
)
select n.nspname as schema,
       c.relname as name,
       c.oid,
       greatest(c.reltuples, 0)::pg_catalog.float8 as rows,
       case when $1 then coalesce(pg_catalog.pg_table_size(c.oid), 0) else 9223372036854775807 end as bytes,
       a.attname as column,
       pg_catalog.format_type(a.atttypid, a.atttypmod) as type,
       a.attgenerated <> '' as generated,
       k.place,
       k.equals,
       o.ordered,
       case when not o.ordered then null
            when a.attcollation = 0 then ''
            when a.attcollation = 'pg_catalog."default"'::pg_catalog.regcollation then (select d.sorts_by from database d)
            else (select l.sorts_by from collations l where l.oid = a.attcollation)
       end as sorts_by
from pg_catalog.pg_publication p
join pg_catalog.pg_publication_rel r on r.prpubid = p.oid
join pg_catalog.pg_class c on c.oid = r.prrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_catalog.pg_type t on t.oid = a.atttypid
join pg_catalog.pg_type b on b.oid = case t.typtype when 'd' then t.typbasetype else t.oid end
cross join lateral (
  select b.oid < 16384 and b.typname in ('bool', 'int2', 'int4', 'int8', 'numeric', 'float4', 'float8', 'money', 'text', 'varchar',
    'bpchar', 'name', 'char', 'bytea', 'date', 'time', 'timetz', 'timestamp', 'timestamptz', 'interval', 'uuid', 'inet',
    'cidr', 'macaddr', 'macaddr8', 'bit', 'varbit', 'oid', 'pg_lsn', 'xid8') as ordered
) o
left join lateral (
  select i.place::pg_catalog.int4, pg_catalog.format('operator(%I.%s)', s.nspname, o.oprname) as equals
  from keys
  cross join unnest(keys.indkey::pg_catalog.int2[], keys.indclass::pg_catalog.oid[])
    with ordinality i (attnum, opclass, place)
  join pg_catalog.pg_opclass oc on oc.oid = i.opclass
  join pg_catalog.pg_amop m on m.amopfamily = oc.opcfamily and m.amopstrategy = 3
    and m.amoplefttype = oc.opcintype and m.amoprighttype = oc.opcintype
  join pg_catalog.pg_operator o on o.oid = m.amopopr
  join pg_catalog.pg_namespace s on s.oid = o.oprnamespace
  where keys.indrelid = c.oid and i.place <= keys.indnkeyatts and i.attnum = a.attnum
) k on true
where p.pubname = 'pgflip' and n.nspname <> 'pgflip'
order by n.nspname, c.relname, a.attname
