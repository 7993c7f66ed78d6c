-- Who has table $1 (an OID) locked in any way: pid and description. Servers 13 and later.
select a.pid, pg_catalog.format('of %s (%s, %s), its transaction open for %s s', coalesce(a.usename, '?'),
              coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, a.backend_type),
              coalesce(round(extract(epoch from clock_timestamp() - a.xact_start))::bigint::text, '?')) as who
from pg_catalog.pg_stat_activity a
where a.pid <> pg_catalog.pg_backend_pid()
  and a.pid in (select l.pid from pg_catalog.pg_locks l
                where l.locktype = 'relation' and l.relation = $1 and l.granted
                  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()))
order by a.xact_start
limit 5
