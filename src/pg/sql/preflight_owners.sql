-- Who owns the database and what the application has in it: name, superuser or not, whether pgflip's role has what it needs of
-- it (inherits its rights, may SET ROLE to it: from 16 on these are two things), a few of its things and how many there are.
-- Servers 13 and later.
with extensions as materialized (
    select classid, objid from pg_depend where deptype = 'e'
), spaces as materialized (
    select n.oid, n.nspname, n.nspowner from pg_namespace n
    where n.nspname not in ('pg_catalog', 'information_schema', 'pgflip', 'pg_toast') and n.nspname !~ '^pg_(toast_)?temp_'
), owned (owner, what) as (
    select d.datdba, format('database %I', d.datname) from pg_database d where d.datname = current_database()
    union all
    select n.nspowner, format('schema %I', n.nspname) from spaces n where n.oid >= 16384
       and not exists (select from extensions e where e.classid = 'pg_namespace'::regclass and e.objid = n.oid)
    union all
    select c.relowner, format('%I.%I', n.nspname, c.relname) from pg_class c join spaces n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'v', 'm', 'f', 'S') and c.oid >= 16384
      and not exists (select from extensions e where e.classid = 'pg_class'::regclass and e.objid = c.oid)
    union all
    select p.proowner, format('function %I.%I', n.nspname, p.proname) from pg_proc p join spaces n on n.oid = p.pronamespace
    where p.oid >= 16384
      and not exists (select from extensions e where e.classid = 'pg_proc'::regclass and e.objid = p.oid)
    union all
    select t.typowner, format('type %I.%I', n.nspname, t.typname) from pg_type t join spaces n on n.oid = t.typnamespace
    where t.typtype in ('e', 'd', 'r') and t.oid >= 16384
      and not exists (select from extensions e where e.classid = 'pg_type'::regclass and e.objid = t.oid)
)
select r.rolname::text as owner, r.rolsuper as superuser,
       pg_has_role(r.oid, 'USAGE')
           and pg_has_role(r.oid, case when current_setting('server_version_num')::int >= 160000 then 'SET' else 'MEMBER' end)
           as has,
       (array_agg(o.what order by o.what))[1:3] as things, count(*) as n
from owned o
join pg_roles r on r.oid = o.owner
where r.rolname !~ '^pg_'
group by r.oid, r.rolname, r.rolsuper
order by 1
