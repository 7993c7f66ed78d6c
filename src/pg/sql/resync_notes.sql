-- Active side: the tables that are being copied to the standby anew and have not come to the end of it, oldest first, as they are
-- called now. One that is gone counts as the one that has its name. What an earlier epoch has left, and tables that are gone, don't
-- count, nor do those that were made UNLOGGED, which no link carries. An earlier pgflip's have no OIDs (`relid`) and no `token`. Servers
-- 13 and later.
select n.nspname as schema, c.relname as name, r.emptied, pg_catalog.to_jsonb(r) ->> 'token' as token
from pgflip.resync r
join pgflip.state s on s.epoch = r.epoch
cross join lateral (select (pg_catalog.to_jsonb(r) ->> 'relid')::pg_catalog.oid as relid) o
join pg_catalog.pg_class c on c.relkind = 'r' and c.relpersistence = 'p'
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.oid = o.relid
   or (n.nspname = r.schema and c.relname = r.name and not exists (select from pg_catalog.pg_class g where g.oid = o.relid))
order by r.at
