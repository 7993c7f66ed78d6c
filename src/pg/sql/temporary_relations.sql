-- Temporary tables, sequences and views. $1: OIDs of their schemas. Their sizes: src/pg/temporary.rs. What temporary_objects.sql and
-- sessions_temporary.sql stand on.
select c.oid, c.relname, c.relkind, c.reloptions, c.relnamespace, n.nspname,
       quote_ident(pg_get_userbyid(c.relowner)) as owner, 'pg_temp.' || quote_ident(c.relname) as name,
       size.bytes,
       case
           when c.relkind not in ('r', 'S', 'v') then 'is no table, sequence or view'
           when c.relispartition or exists (select from pg_inherits i where c.oid in (i.inhrelid, i.inhparent))
               then 'has parents or children'
           when c.reloftype <> 0 then 'is of a type'
           when c.relkind = 'r' and c.relam <> (select oid from pg_am where amname = 'heap') then 'is no heap'
           when exists (select from pg_trigger t where t.tgrelid = c.oid) then 'has triggers or foreign keys'
           when exists (select from pg_rewrite r where r.ev_class = c.oid and r.rulename <> '_RETURN') then 'has rules'
           when c.relrowsecurity or exists (select from pg_policy p where p.polrelid = c.oid) then 'has policies'
           when c.relacl is not null
                or exists (select from pg_attribute a where a.attrelid = c.oid and a.attacl is not null)
               then 'has privileges of its own'
           when exists (select from pg_statistic_ext s where s.stxrelid = c.oid) then 'has extended statistics'
           when exists (select from pg_description d where d.classoid = 'pg_class'::regclass and d.objoid = c.oid)
               then 'has comments'
           when c.relkind = 'v' and c.reloptions is not null
                or exists (select from pg_class t where t.oid = c.reltoastrelid and t.reloptions is not null)
               then 'has options'
           when exists (select from pg_constraint o where o.conrelid = c.oid and not o.convalidated)
               then 'has constraints that are not validated'
           when c.relkind = 'r'
                and exists (select from pg_attribute a join pg_type t on t.oid = a.atttypid
                             where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                               and (a.attoptions is not null or a.attstorage <> t.typstorage
                                    or coalesce(a.attstattarget, -1) <> -1))
               then 'has columns with options, or stored in a way of their own'
           when c.relkind = 'r'
                and not exists (select from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                                                             and a.attgenerated = '')
               then 'has no column that can be written'
           -- Only the session itself knows, and TRUNCATE leaves the same.
           when c.relkind = 'r' and size.rows = 0
               then 'is empty: nobody can tell whether it is ON COMMIT DELETE ROWS'
       end as obstacle
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
  cross join lateral ({sizes}) size
 where c.relnamespace = any ($1) and c.relkind not in ('i', 'I', 't')
