-- Replication origins of a server that are in use, and pgflip's among them. Databases of this config: $1. By itself, because
-- who is no superuser may lack the right to see them. Servers 13 and later.
with mine as (
    select s.oid from pg_subscription s join pg_database d on d.oid = s.subdbid
    where s.subname ~ '^pgflip_to_' and d.datname = any ($1)
)
select count(*)::int as origins,
       (count(*) filter (where o.external_id ~ '^pgflip_[0-9]+$' or o.external_id in (select 'pg_' || oid from mine)))::int
           as origins_mine
from pg_show_replication_origin_status() o
