-- Existing tables, armed tables and published tables by OID: what a flip compares inside its window with what the full
-- check found before it. Servers 13+. The sets of fence_tables.sql.
with existing as (
    select c.oid, t.tgenabled = 'A' as armed
      from pg_class c
      left join pg_trigger t on t.tgrelid = c.oid and t.tgname = 'pgflip_fence'
                            and t.tgfoid = 'pgflip.fence()'::regprocedure
     where c.relkind in ('r', 'p') and c.relpersistence <> 't'
       and c.relnamespace not in (select oid from pg_namespace
                                   where nspname in ('pg_catalog', 'information_schema', 'pg_toast', 'pgflip')
                                      or nspname like 'pg\_temp\_%' or nspname like 'pg\_toast\_temp\_%')
), published as (
    select r.prrelid as oid
      from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
     where p.pubname = 'pgflip'
)
select (select count(*) from existing) as tables,
       (select count(*) from existing where armed) as armed,
       (select coalesce(md5(string_agg(oid::text, ',' order by oid)), '') from existing) as existing,
       (select coalesce(md5(string_agg(oid::text, ',' order by oid)), '') from published) as published
