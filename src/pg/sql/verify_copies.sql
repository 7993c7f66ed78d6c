-- Standby: of each table that subscription $1 carries, what is another text once the table has been copied again. Servers 13 and
-- later.
select n.nspname as schema, c.relname as name, pg_catalog.concat_ws(' ', r.srsubid, r.srsubstate, r.srsublsn) as copy
from pg_catalog.pg_subscription s
join pg_catalog.pg_subscription_rel r on r.srsubid = s.oid
join pg_catalog.pg_class c on c.oid = r.srrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where s.subname = $1 and s.subdbid = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
