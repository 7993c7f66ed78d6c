-- Types that a copy is to have with the same OIDs: those of type_oids.sql but for multiranges, which come with their
-- ranges, and with shells, which are types that are only named yet. Of each its extension, if it belongs to one (else 0);
-- whether it is a range with a canonical function, whose shell pg_dump makes itself; and for a domain that is NOT NULL the
-- statement that makes it without that (from 17 on NOT NULL takes an OID). Servers 13 and later.
select t.oid, t.typarray as array_oid, format_type(t.oid, null) as name, t.typtype::text as kind, t.typisdefined as defined,
       coalesce(d.refobjid, 0) as extension,
       exists (select from pg_range r where r.rngtypid = t.oid and r.rngcanonical <> 0) as canonical,
       case when t.typtype = 'd' and t.typnotnull then
           format('create domain %s as %s', format_type(t.oid, null), format_type(t.typbasetype, t.typtypmod))
           || coalesce((select format(' collate %I.%I', s.nspname, l.collname)
                        from pg_collation l join pg_namespace s on s.oid = l.collnamespace, pg_type b
                        where l.oid = t.typcollation and b.oid = t.typbasetype and t.typcollation <> b.typcollation), '')
           || coalesce(' default ' || pg_get_expr(t.typdefaultbin, 'pg_type'::regclass), '')
           || coalesce((select string_agg(format(' constraint %I %s', o.conname, pg_get_constraintdef(o.oid)), '' order by o.conname)
                        from pg_constraint o where o.contypid = t.oid and o.contype = 'c' and o.convalidated), '')
       end as nullable
from pg_type t
join pg_namespace n on n.oid = t.typnamespace
left join pg_class c on c.oid = t.typrelid
left join pg_depend d on d.classid = 'pg_type'::regclass and d.objid = t.oid and d.deptype = 'e'
                         and d.refclassid = 'pg_extension'::regclass
where t.oid >= 16384
  and n.nspname not in ('pgflip', 'pg_toast')
  and n.nspname !~ '^pg_temp'
  and (t.typrelid = 0 or c.relkind = 'c')
  and not (t.typelem <> 0 and t.typcategory = 'A')
  and t.typtype <> 'm'
order by t.oid
