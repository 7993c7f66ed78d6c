-- The OIDs of types. $1: chr(2)-separated list of schema, chr(1), name. Rows: place in the list from 1, OID. Servers 13 and
-- later.
select q.n, t.oid
  from pg_catalog.unnest(pg_catalog.string_to_array($1, pg_catalog.chr(2))) with ordinality q (name, n)
  join pg_catalog.pg_namespace s
    on s.nspname OPERATOR(pg_catalog.=) pg_catalog.split_part(q.name, pg_catalog.chr(1), 1)
  join pg_catalog.pg_type t
    on t.typnamespace OPERATOR(pg_catalog.=) s.oid
   and t.typname OPERATOR(pg_catalog.=) pg_catalog.split_part(q.name, pg_catalog.chr(1), 2)
