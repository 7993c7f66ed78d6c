-- What of this database only a superuser can make again elsewhere, beside extensions. Servers 13 and later.
select format('event trigger %I', v.evtname) as what
from pg_event_trigger v
where v.evtname <> 'pgflip_fence_ddl'
  and not exists (select from pg_depend d
                  where d.classid = 'pg_event_trigger'::regclass and d.objid = v.oid and d.deptype = 'e')
union all
select format('function %I.%I (language %s)', n.nspname, p.proname, l.lanname)
from pg_proc p
join pg_namespace n on n.oid = p.pronamespace
join pg_language l on l.oid = p.prolang and not l.lanpltrusted and l.lanname <> 'sql'
where p.oid >= 16384 and n.nspname not in ('pg_catalog', 'information_schema', 'pgflip')
  and not exists (select from pg_depend d
                  where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype in ('e', 'i'))
order by 1
