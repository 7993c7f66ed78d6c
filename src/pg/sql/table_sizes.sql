-- How much there is to copy of each published table: bytes on disk (without indexes), rows as last counted (-1: never).
-- Servers 13 and later.
select n.nspname as schema, c.relname as name, pg_table_size(c.oid) as bytes, c.reltuples::bigint as rows
from pg_publication p
join pg_publication_rel r on r.prpubid = p.oid
join pg_class c on c.oid = r.prrelid
join pg_namespace n on n.oid = c.relnamespace
where p.pubname = 'pgflip' and n.nspname <> 'pgflip'
