-- Tables whose UPDATEs and DELETEs a link could not carry. Of every table that is to be published
-- (tables_to_publish.sql): how rows are told apart there, and what is wrong with it:
--   none      nothing tells them apart: publishing the table would make the application's own UPDATEs and DELETEs fail
--   generated the index has a generated column, which is not sent
--   json      REPLICA IDENTITY FULL with a type that has no equality: applying UPDATEs and DELETEs fails
--   full      REPLICA IDENTITY FULL: every UPDATE and DELETE looks through the table (only told for large tables)
-- With a unique index that would do, if there is one. Servers 13 and later.
with published as (
    select c.oid, n.nspname as schema, c.relname as name, c.relreplident, c.reltuples
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and c.relpersistence = 'p' and c.oid >= 16384
      and n.nspname not in ('pg_catalog', 'information_schema', 'pgflip')
      and n.nspname !~ '^pg_(toast|temp)'
      and not exists (select from pg_depend d
                      where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
), identity as (
    select p.*,
           (select i.indexrelid from pg_index i
            where i.indrelid = p.oid and i.indisvalid and i.indimmediate
              and ((p.relreplident = 'd' and i.indisprimary) or (p.relreplident = 'i' and i.indisreplident))
            limit 1) as index,
           (select format('%I', ic.relname) from pg_index i join pg_class ic on ic.oid = i.indexrelid
            where i.indrelid = p.oid and i.indisvalid and i.indimmediate and i.indisunique
              and i.indpred is null and i.indexprs is null
              and not exists (select from pg_attribute a
                              where a.attrelid = p.oid and a.attnum = any (i.indkey::int2[]) and not a.attnotnull)
            order by i.indisprimary desc, i.indnatts limit 1) as candidate
    from published p
), judged as (
    select i.*, case
        when i.relreplident = 'f' and exists (
            select from pg_attribute a join pg_type t on t.oid = a.atttypid
            left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
            where a.attrelid = i.oid and a.attnum > 0 and not a.attisdropped
              and coalesce(e.oid, t.oid) in ('json'::regtype, 'xml'::regtype, 'point'::regtype, 'line'::regtype,
                                             'lseg'::regtype, 'box'::regtype, 'path'::regtype, 'polygon'::regtype,
                                             'circle'::regtype, 'txid_snapshot'::regtype)) then 'json'
        when i.relreplident = 'f' and i.reltuples > 10000 then 'full'
        when i.relreplident = 'f' then null
        when i.index is null then 'none'
        when exists (select from pg_attribute a join pg_index x on x.indexrelid = i.index
                     where a.attrelid = i.oid and a.attnum = any (x.indkey::int2[]) and a.attgenerated <> '')
            then 'generated'
    end as wrong
    from identity i
)
select schema, name, wrong, candidate
from judged
where wrong is not null
order by 1, 2
