-- Ends clients' sessions, pgflip's own excepted, that hold a lock on one of these tables ($1) which keeps the fence's trigger
-- from being switched. Servers 13+.
select format('%s of %s (%s)', a.pid, coalesce(a.usename, '?'), coalesce(nullif(a.application_name, ''), 'no application_name'))
  from pg_stat_activity a
 where a.backend_type = 'client backend' and a.application_name not like 'pgflip: %' and a.pid <> pg_backend_pid()
   and exists (select from pg_locks l
                where l.pid = a.pid and l.locktype = 'relation' and l.relation = any ($1) and l.granted
                  and l.database = (select oid from pg_database where datname = current_database())
                  and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock',
                                 'ExclusiveLock', 'AccessExclusiveLock'))
   and pg_terminate_backend(a.pid)
