-- Every sequence that a column uses (its default, identity, or OWNED BY), with that column, for a side that becomes active
-- without having heard the last of the other one. Sequences that cycle are left where they are. Servers 13+.
select distinct s.seqrelid as oid, s.seqincrement as increment, s.seqmin as min, s.seqmax as max,
       format('%I.%I', n.nspname, c.relname) as table, format('%I', a.attname) as column
  from pg_sequence s
  join pg_class q on q.oid = s.seqrelid and q.relpersistence <> 't'
  join (select d.objid as seq, d.refobjid as rel, d.refobjsubid as col
          from pg_depend d
         where d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass
           and d.deptype in ('a', 'i') and d.refobjsubid > 0
        union
        select d.refobjid, def.adrelid, def.adnum
          from pg_depend d join pg_attrdef def on def.oid = d.objid
         where d.classid = 'pg_attrdef'::regclass and d.refclassid = 'pg_class'::regclass) uses on uses.seq = s.seqrelid
  join pg_class c on c.oid = uses.rel and c.relkind in ('r', 'p')
  join pg_namespace n on n.oid = c.relnamespace and n.nspname <> 'pgflip'
  join pg_attribute a on a.attrelid = c.oid and a.attnum = uses.col and a.atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
 where not s.seqcycle
 order by 1
