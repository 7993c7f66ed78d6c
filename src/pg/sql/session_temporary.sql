-- What can't be moved of what is in a session's schema for temporary objects. Runs in the session itself, behind
-- session_limits.sql; for tables, views and sequences see temporary_objects.sql. Columns: what, which. Servers 13 and later.
select 'temporary functions', p.proname::pg_catalog.text
  from pg_catalog.pg_proc p
 where p.pronamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
union all
select 'temporary types', t.typname::pg_catalog.text
  from pg_catalog.pg_type t
 where t.typnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
   and t.typrelid OPERATOR(pg_catalog.=) 0::pg_catalog.oid
   and t.typelem OPERATOR(pg_catalog.=) 0::pg_catalog.oid
union all
select 'temporary objects of other kinds',
       pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)
  from pg_catalog.pg_depend d
 where d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass::pg_catalog.oid
   and d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
   and d.classid OPERATOR(pg_catalog.<>) all (array['pg_catalog.pg_class', 'pg_catalog.pg_type', 'pg_catalog.pg_proc',
         'pg_catalog.pg_constraint']::pg_catalog.regclass[]::pg_catalog.oid[])
