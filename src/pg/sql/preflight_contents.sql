-- What of a database no link carries, or what would go wrong on its other end: kind and a name. Servers 13 and later.
select 'unlogged' as kind, c.oid::regclass::text as name
from pg_class c where c.relkind = 'r' and c.relpersistence = 'u' and c.oid >= 16384
union all
select 'foreign', c.oid::regclass::text from pg_class c where c.relkind = 'f'
union all
select 'matview', c.oid::regclass::text from pg_class c where c.relkind = 'm' and c.oid >= 16384
union all
select 'extension', format('%s (%s)', c.oid::regclass, e.extname)
from pg_class c
join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e'
join pg_extension e on e.oid = d.refobjid
where c.relkind = 'r' and c.relpersistence = 'p'
union all
select 'large_object', count(*)::text from pg_largeobject_metadata having count(*) > 0
union all
select 'trigger', format('%I on %s', t.tgname, t.tgrelid::regclass)
from pg_trigger t
where not t.tgisinternal and t.tgenabled in ('A', 'R') and t.tgname <> 'pgflip_fence'
union all
select 'subscription', format('%I', s.subname)
from pg_subscription s
where s.subdbid = (select oid from pg_database where datname = current_database()) and s.subname !~ '^pgflip_to_'
union all
select 'tablespace', t.spcname::text
from pg_tablespace t
where exists (select from pg_class c where c.reltablespace = t.oid and c.oid >= 16384)
union all
select 'needs_extension', e.extname::text from pg_extension e
union all
select 'all_tables_publication', p.pubname::text from pg_publication p where p.pubname = 'pgflip' and p.puballtables
union all
select 'prepared', format('%L, owner %s', p.gid, p.owner) from pg_prepared_xacts p where p.database = current_database()
