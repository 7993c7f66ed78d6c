-- Who waits for an advisory lock, and who holds it, in all databases of the server. A key as an application writes it: one
-- number or two. Servers 13 and later.
with locks as materialized (
    select pid, granted, database, classid, objid, objsubid from pg_locks where locktype = 'advisory')
select distinct w.pid as waiter, h.pid as holder,
       case w.objsubid when 1 then ((w.classid::int8 << 32) | w.objid::int8)::text
                       else w.classid::int4 || ', ' || w.objid::int4 end as key
  from locks w
  join locks h using (database, classid, objid, objsubid)
 where not w.granted and h.granted and h.pid <> w.pid
