-- The tables in publication pgflip, its marker included. Servers 13 and later.
select c.oid, n.nspname as schema, c.relname as name
from pg_publication p
join pg_publication_rel r on r.prpubid = p.oid
join pg_class c on c.oid = r.prrelid
join pg_namespace n on n.oid = c.relnamespace
where p.pubname = 'pgflip'
order by c.oid
