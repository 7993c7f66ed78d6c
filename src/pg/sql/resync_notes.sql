-- Active side: the tables that are being copied to the standby anew and have not come to the end of it, oldest first. What an
-- earlier epoch has left, and tables that are gone, don't count. Servers 13 and later.
select r.schema, r.name, r.emptied
from pgflip.resync r
join pgflip.state s on s.epoch = r.epoch
where exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
              where n.nspname = r.schema and c.relname = r.name and c.relkind = 'r')
order by r.at
