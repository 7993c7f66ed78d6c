-- What makes a session's temporary tables, sequences and views anew. Behind temporary_relations.sql, in a session of the
-- client's with search_path pg_catalog, pg_temp. Columns: namespace, name, plain (the name unquoted), owner (quoted), part
-- ('sequence', 'table', 'index', 'view', 'owned': in the order in which they are made), statement, columns (of a table, to
-- copy), bytes, obstacle (why it can't be made anew; null: it can). Servers 13 and later.
, sequences as materialized (
    select t.oid, format('%s increment by %s minvalue %s maxvalue %s start with %s cache %s%s', t.name, s.seqincrement,
                         s.seqmin, s.seqmax, s.seqstart, s.seqcache, case when s.seqcycle then ' cycle' else '' end) as options,
           format_type(s.seqtypid, null) as type, d.deptype, d.refobjid, d.refobjsubid
      from temporary t
      join pg_sequence s on s.seqrelid = t.oid
      left join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = t.oid and d.objsubid = 0
                           and d.refclassid = 'pg_class'::regclass and d.deptype in ('a', 'i')
), columns as materialized (
    select a.attrelid, a.attnum, quote_ident(a.attname) as name, a.attgenerated,
           concat(quote_ident(a.attname), ' ', format_type(a.atttypid, a.atttypmod),
                  case when a.attcollation <> t.typcollation
                       then (select format(' collate %I.%I', n.nspname, o.collname)
                               from pg_collation o join pg_namespace n on n.oid = o.collnamespace where o.oid = a.attcollation) end,
                  case when a.attgenerated = 's' then format(' generated always as (%s) stored', e.text)
                       when a.attgenerated <> '' then format(' generated always as (%s) virtual', e.text)
                       when a.attidentity <> ''
                       then format(' generated %s as identity (sequence name %s)',
                                   case a.attidentity when 'a' then 'always' else 'by default' end,
                                   (select s.options from sequences s
                                     where s.deptype = 'i' and s.refobjid = a.attrelid and s.refobjsubid = a.attnum))
                       when e.text is not null then ' default ' || e.text end,
                  case when a.attnotnull then ' not null' end) as definition
      from pg_attribute a
      join temporary r on r.oid = a.attrelid and r.relkind = 'r'
      join pg_type t on t.oid = a.atttypid
      left join lateral (select pg_get_expr(d.adbin, d.adrelid) as text from pg_attrdef d
                          where d.adrelid = a.attrelid and d.adnum = a.attnum) e on true
     where a.attnum > 0 and not a.attisdropped
), parts as (
    select t.oid, 1 as step, 'sequence' as part, format('create temporary sequence %s as %s', s.options, s.type) as statement,
           null as columns
      from temporary t join sequences s using (oid) where s.deptype is distinct from 'i'
    union all
    -- Made with its table; only its value has to be set.
    select t.oid, 1, 'sequence', null, null from temporary t join sequences s using (oid) where s.deptype = 'i'
    union all
    select t.oid, 2, 'table',
           format('create temporary table %s (%s)%s on commit preserve rows', t.name,
                  concat_ws(', ',
                            (select string_agg(c.definition, ', ' order by c.attnum) from columns c where c.attrelid = t.oid),
                            (select string_agg(format('constraint %I %s', o.conname, pg_get_constraintdef(o.oid)), ', ' order by o.oid)
                               from pg_constraint o where o.conrelid = t.oid and o.contype in ('c', 'p', 'u', 'x'))),
                  ' with (' || array_to_string(t.reloptions, ', ') || ')'),
           (select string_agg(c.name, ', ' order by c.attnum) from columns c where c.attrelid = t.oid and c.attgenerated = '')
      from temporary t where t.relkind = 'r'
    union all
    select t.oid, 3, 'index', pg_get_indexdef(i.indexrelid), null
      from temporary t join pg_index i on i.indrelid = t.oid
     where not exists (select from pg_constraint o where o.conindid = i.indexrelid and o.contype in ('p', 'u', 'x'))
    union all
    select t.oid, 4, 'view', format('create temporary view %s as %s', t.name, rtrim(pg_get_viewdef(t.oid), ';')), null
      from temporary t where t.relkind = 'v'
    union all
    select t.oid, 5, 'owned', format('alter sequence %s owned by pg_temp.%I.%I', t.name, r.relname, a.attname), null
      from temporary t
      join sequences s using (oid)
      join pg_class r on r.oid = s.refobjid
      join pg_attribute a on a.attrelid = s.refobjid and a.attnum = s.refobjsubid
     where s.deptype = 'a'
)
select t.relnamespace as namespace, t.name, t.relname::text as plain, t.owner, p.part,
       -- Whatever this server calls the session's schema. (Some versions do not say pg_temp.)
       replace(p.statement, quote_ident(t.nspname) || '.', 'pg_temp.') as statement,
       p.columns, t.bytes,
       coalesce(t.obstacle,
                case when p.statement like '%;%' then 'has a semicolon in its definition'
                     when p.statement ~ ('''.*' || t.nspname || '\.') then 'names its schema within a literal' end) as obstacle
  from temporary t left join parts p using (oid)
 order by p.step, t.oid, p.statement
