-- Who holds a lock on a table that keeps the fence's trigger from being switched. Servers 13+.
select format('session %s of %s (%s, %s) since %s', a.pid, coalesce(a.usename, '?'),
              coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, a.backend_type),
              coalesce(a.xact_start::text, '?'))
  from pg_locks l join pg_stat_activity a on a.pid = l.pid
 where l.locktype = 'relation' and l.relation = $1 and l.granted and l.pid <> pg_backend_pid()
   and l.database = (select oid from pg_database where datname = current_database())
   and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock',
                  'ExclusiveLock', 'AccessExclusiveLock')
 order by a.xact_start limit 3
