-- What these sessions ($1, pids) have been waiting for since more than a second: tables that are locked, and by whom. Servers 13 and later.
select distinct pg_catalog.format('%s is locked by server process %s of %s (%s, %s), its transaction open for %s s', l.relation::pg_catalog.regclass,
                                  b.pid, coalesce(a.usename, '?'), coalesce(nullif(a.application_name, ''), 'no application_name'),
                                  coalesce(a.state, a.backend_type, '?'),
                                  coalesce(round(extract(epoch from clock_timestamp() - a.xact_start))::bigint::text, '?')) as waits
from pg_catalog.pg_locks l
join pg_catalog.pg_stat_activity w on w.pid = l.pid and w.query_start < clock_timestamp() - interval '1 second'
cross join lateral unnest(pg_catalog.pg_blocking_pids(l.pid)) as b (pid)
left join pg_catalog.pg_stat_activity a on a.pid = b.pid
where l.pid = any ($1) and l.locktype = 'relation' and not l.granted
order by 1 limit 5
