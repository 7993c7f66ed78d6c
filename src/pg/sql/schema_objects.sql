-- Everything of a database's schema that both sides should have alike: kind and name of each object, the table it belongs
-- to if it does, and what it is, field by field (schema.rs knows what each field is). Neither the system's objects, nor
-- those of extensions, nor pgflip's own. Servers 13 and later.
with extensions as materialized (
    select classid, objid from pg_depend where deptype = 'e'
), spaces as materialized (
    select n.oid, n.nspname, n.nspowner, n.nspacl
    from pg_namespace n
    where n.nspname not in ('pg_catalog', 'information_schema', 'pgflip', 'pg_toast') and n.nspname !~ '^pg_(toast_)?temp_'
      and (n.oid >= 16384 or n.nspname = 'public')
      and not exists (select from extensions e where e.classid = 'pg_namespace'::regclass and e.objid = n.oid)
), relations as materialized (
    select format('%I.%I', n.nspname, c.relname) as name, c.*
    from pg_class c
    join spaces n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'v', 'm', 'f', 'S') and c.oid >= 16384
      and not exists (select from extensions e where e.classid = 'pg_class'::regclass and e.objid = c.oid)
), functions as materialized (
    select format('%I.%I(%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)) as name, p.*
    from pg_proc p
    join spaces n on n.oid = p.pronamespace
    where p.oid >= 16384
      and not exists (select from extensions e where e.classid = 'pg_proc'::regclass and e.objid = p.oid)
      -- What the server makes along with a range: more from 14 on, because of multiranges. pg_dump leaves it out as well.
      and not exists (select from pg_depend d
                      where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'i')
), types as materialized (
    select format('%I.%I', n.nspname, t.typname) as name, t.*
    from pg_type t
    join spaces n on n.oid = t.typnamespace
    left join pg_class c on c.oid = t.typrelid
    where t.typtype in ('e', 'd', 'r', 'c') and (t.typrelid = 0 or c.relkind = 'c') and t.oid >= 16384
      and not exists (select from extensions e where e.classid = 'pg_type'::regclass and e.objid = t.oid)
), acls (name, belongs_to, owner, acl) as (
    select case r.relkind when 'S' then 'sequence ' else 'table ' end || r.name, r.name, r.relowner,
           coalesce(r.relacl, acldefault(case r.relkind when 'S' then 's' else 'r' end::"char", r.relowner))
    from relations r
    union all
    select format('column %s.%I', r.name, a.attname), r.name, r.relowner, a.attacl
    from relations r join pg_attribute a on a.attrelid = r.oid and a.attacl is not null and not a.attisdropped
    union all
    select 'function ' || f.name, null, f.proowner, coalesce(f.proacl, acldefault('f', f.proowner)) from functions f
    union all
    select 'type ' || t.name, null, t.typowner, coalesce(t.typacl, acldefault('T', t.typowner)) from types t
    union all
    -- The system's own schema belongs to another role from 15 on.
    select format('schema %I', n.nspname), null, nullif(n.nspowner, case when n.nspname = 'public' then n.nspowner end),
           coalesce((select array_agg(i) from unnest(n.nspacl) i
                     where n.nspname <> 'public' or split_part(i::text, '=', 1) <> quote_ident(pg_get_userbyid(n.nspowner))),
                    case when n.nspname <> 'public' then acldefault('n', n.nspowner) end, '{}')
    from spaces n
    union all
    select format('foreign server %I', s.srvname), null, s.srvowner, coalesce(s.srvacl, acldefault('S', s.srvowner))
    from pg_foreign_server s
    where not exists (select from extensions e where e.classid = 'pg_foreign_server'::regclass and e.objid = s.oid)
)
select 'relation' as kind, r.name, null::text as belongs_to,
       array[r.relkind::text, r.relpersistence::text,
             coalesce(case when r.relkind = 'p' then pg_get_partkeydef(r.oid) end, ''),
             coalesce(pg_get_expr(r.relpartbound, r.oid), ''),
             array(select p.inhparent::regclass::text from pg_inherits p where p.inhrelid = r.oid order by 1)::text] as fields
from relations r
union all
select 'column', format('%s.%I', r.name, a.attname), r.name,
       array[format_type(a.atttypid, a.atttypmod), a.attnotnull::text, a.attgenerated::text, a.attidentity::text,
             coalesce((select format('%I', l.collname) from pg_collation l
                       where l.oid = a.attcollation and a.attcollation <> t.typcollation), ''),
             coalesce(pg_get_expr(d.adbin, d.adrelid), '')]
from relations r
join pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
join pg_type t on t.oid = a.atttypid
left join pg_attrdef d on d.adrelid = r.oid and d.adnum = a.attnum
where r.relkind in ('r', 'p')
union all
select 'identity', r.name, r.name,
       array[r.relreplident::text,
             coalesce((select string_agg(format('%I', a.attname), ', ' order by a.attname)
                       from pg_index i join pg_attribute a on a.attrelid = r.oid and a.attnum = any (i.indkey::int2[])
                       where i.indrelid = r.oid and ((r.relreplident = 'd' and i.indisprimary)
                                                     or (r.relreplident = 'i' and i.indisreplident))), '')]
from relations r
where r.relkind = 'r'
union all
select 'rls', r.name, r.name,
       array[r.relrowsecurity::text, r.relforcerowsecurity::text,
             array(select o from unnest(r.reloptions) o where o ~ '^security_(barrier|invoker)=' order by 1)::text]
from relations r
where r.relkind in ('r', 'p', 'v')
union all
select 'policy', format('%I on %s', p.polname, r.name), r.name,
       array[p.polpermissive::text, p.polcmd::text,
             array(select case u.role when 0 then 'PUBLIC' else pg_get_userbyid(u.role)::text end
                   from unnest(p.polroles) u (role) order by 1)::text,
             coalesce(pg_get_expr(p.polqual, p.polrelid), ''), coalesce(pg_get_expr(p.polwithcheck, p.polrelid), '')]
from relations r
join pg_policy p on p.polrelid = r.oid
union all
select 'grant', a.name, a.belongs_to,
       array[coalesce(pg_get_userbyid(a.owner)::text, '')]
           || array(select distinct concat(case x.grantee when 0 then 'PUBLIC' else pg_get_userbyid(x.grantee)::text end,
                                           ': ', x.privilege_type, case when x.is_grantable then ' WITH GRANT OPTION' end)
                    from aclexplode(a.acl) x order by 1)
from acls a
union all
select 'default grant', format('%s, %s, %s', pg_get_userbyid(d.defaclrole), d.defaclobjtype,
                               coalesce(d.defaclnamespace::regnamespace::text, '')), null,
       array[''] || array(select distinct concat(case x.grantee when 0 then 'PUBLIC' else pg_get_userbyid(x.grantee)::text end,
                                                 ': ', x.privilege_type, case when x.is_grantable then ' WITH GRANT OPTION' end)
                          from aclexplode(d.defaclacl) x order by 1)
from pg_default_acl d
where d.defaclnamespace = 0 or d.defaclnamespace in (select oid from spaces)
union all
-- NOT NULL is a constraint from 18 on; the columns tell of it. Partitions' names for what they inherit are the server's.
select 'constraint', format('%I on %s', k.conname, r.name), r.name,
       array[k.contype::text, k.condeferrable::text || k.condeferred::text || k.convalidated::text, pg_get_constraintdef(k.oid)]
from relations r
join pg_constraint k on k.conrelid = r.oid and k.contype in ('c', 'f', 'p', 'u', 'x') and k.conparentid = 0
union all
select 'index', format('%I on %s', c.relname, r.name), r.name,
       array[i.indisunique::text, i.indisvalid::text, pg_get_indexdef(i.indexrelid)]
from relations r
join pg_index i on i.indrelid = r.oid
join pg_class c on c.oid = i.indexrelid
union all
select 'trigger', format('%I on %s', t.tgname, r.name), r.name, array[t.tgenabled::text, pg_get_triggerdef(t.oid)]
from relations r
join pg_trigger t on t.tgrelid = r.oid and not t.tgisinternal and t.tgparentid = 0 and t.tgname <> 'pgflip_fence'
union all
select 'rule', format('%I on %s', w.rulename, r.name), r.name, array[w.ev_enabled::text, pg_get_ruledef(w.oid)]
from relations r
join pg_rewrite w on w.ev_class = r.oid and w.rulename <> '_RETURN'
union all
select 'view', r.name, r.name, array[pg_get_viewdef(r.oid)] from relations r where r.relkind in ('v', 'm')
union all
select 'function', f.name, null,
       array[concat_ws(' ', f.prokind, l.lanname, format_type(f.prorettype, null), f.proretset, f.provolatile,
                       f.proisstrict, f.prosecdef, f.proleakproof, f.proparallel, f.proconfig::text, f.proargnames::text,
                       f.proargmodes::text, f.probin, md5(f.prosrc)),
             coalesce(case when f.proargdefaults is not null then pg_get_expr(f.proargdefaults, 0) end, ''),
             case when f.prokind <> 'a' and to_jsonb(f) ->> 'prosqlbody' is not null then pg_get_functiondef(f.oid) else '' end]
from functions f
join pg_language l on l.oid = f.prolang
union all
select 'type', t.name, null,
       array[t.typtype::text,
             case t.typtype
                 when 'e' then array(select e.enumlabel::text from pg_enum e where e.enumtypid = t.oid order by e.enumsortorder)::text
                 when 'c' then array(select format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)) from pg_attribute a
                                     where a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped order by a.attnum)::text
                 when 'r' then (select format_type(g.rngsubtype, null) from pg_range g where g.rngtypid = t.oid)
                 else concat(format_type(t.typbasetype, t.typtypmod), case when t.typnotnull then ' not null' end)
             end,
             coalesce(concat_ws('; ', t.typdefault,
                                (select string_agg(pg_get_constraintdef(k.oid), '; ' order by k.conname)
                                 from pg_constraint k where k.contypid = t.oid and k.contype = 'c')), '')]
from types t
union all
select 'extension', e.extname::text, null, array[]::text[] from pg_extension e
union all
select 'event trigger', v.evtname::text, null,
       array[v.evtevent::text, v.evtenabled::text, v.evtfoid::regproc::text, v.evttags::text]
from pg_event_trigger v
where v.evtname <> 'pgflip_fence_ddl'
  and not exists (select from extensions e where e.classid = 'pg_event_trigger'::regclass and e.objid = v.oid)
