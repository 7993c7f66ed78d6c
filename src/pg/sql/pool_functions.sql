-- Functions of the database that may change what a session holds beside its transaction: they set, listen, lock, prepare or make
-- temporary tables, or call one that does. Columns: its name; whether something else than a statement's text may call it (a
-- trigger, a rule or view, a default, a policy). By their text (BEGIN ATOMIC has none but what it is shown as): what is put together at run time, or written in C, is not seen.
-- Servers 13 and later.
with recursive f as (
  select p.oid, pg_catalog.lower(p.proname::text) as name, pg_catalog.lower(case when p.prosrc <> '' then p.prosrc else pg_catalog.pg_get_functiondef(p.oid) end) as text
    from pg_catalog.pg_proc p
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    join pg_catalog.pg_language l on l.oid = p.prolang
   where n.nspname not in ('pg_catalog', 'information_schema', 'pgflip')
     and l.lanname not in ('c', 'internal')
     and p.prokind in ('f', 'p', 'w')
),
found as (
  select f.oid, f.name
    from f
   where f.text ~ '(set_config|advisory_lock|set_limit|\mtemp(orary)?\M|pg_temp|\mexecute\M)'
      or f.text ~ '(^|;|\mthen\M|\melse\M|\mbegin\M|\mloop\M)\s*(set\s+(?!local\M|transaction\M|constraints\M)|reset\s|listen\s|unlisten\s|discard\s|prepare\s|deallocate\s|load\s|declare\s+\w+\s+.*with\s+hold)'
  union
  select f.oid, f.name
    from f
    join found g on pg_catalog.strpos(f.text, g.name) > 0
)
select distinct found.name,
       exists (select from pg_catalog.pg_trigger t where t.tgfoid = found.oid)
       or exists (select from pg_catalog.pg_depend d
                   where d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                     and d.refobjid = found.oid
                     and d.classid in ('pg_catalog.pg_rewrite'::pg_catalog.regclass, 'pg_catalog.pg_attrdef'::pg_catalog.regclass,
                                       'pg_catalog.pg_policy'::pg_catalog.regclass, 'pg_catalog.pg_constraint'::pg_catalog.regclass,
                                       'pg_catalog.pg_operator'::pg_catalog.regclass, 'pg_catalog.pg_cast'::pg_catalog.regclass))
  from found
