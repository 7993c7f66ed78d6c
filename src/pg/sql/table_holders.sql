-- Who holds a lock on one of these tables ($1): one that keeps the fence's trigger from being switched, or with $2 any: pid and
-- description. Servers 13+.
select a.pid, format('of %s (%s, %s), its transaction open for %s s', coalesce(a.usename, '?'),
              coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, a.backend_type),
              coalesce(round(extract(epoch from clock_timestamp() - a.xact_start))::bigint::text, '?')) as who
  from pg_stat_activity a
 where a.pid <> pg_backend_pid()
   and a.pid in (select l.pid from pg_locks l
                  where l.locktype = 'relation' and l.relation = any ($1) and l.granted
                    and l.database = (select oid from pg_database where datname = current_database())
                    and ($2 or l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock',
                                   'ExclusiveLock', 'AccessExclusiveLock')))
 order by a.xact_start limit 5
