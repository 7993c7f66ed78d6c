-- Ends clients' sessions, pgflip's own excepted, that hold a lock on one of these tables ($1) which keeps the fence's trigger
-- from being switched, in a transaction that is older than $2 seconds. Who that is has to be known before the first one is ended: among the conditions of one WHERE the
-- planner would call the function for others as well. Servers 13+.
with holders as materialized (
    select a.pid, format('%s of %s (%s)', a.pid, coalesce(a.usename, '?'),
                         coalesce(nullif(a.application_name, ''), 'no application_name')) as who
      from pg_stat_activity a
     where a.backend_type = 'client backend' and a.application_name not like 'pgflip: %' and a.pid <> pg_backend_pid()
       and a.xact_start < clock_timestamp() - $2 * interval '1 second'
       and a.pid in (select l.pid from pg_locks l
                      where l.locktype = 'relation' and l.relation = any ($1) and l.granted
                        and l.database = (select oid from pg_database where datname = current_database())
                        and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock',
                                       'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')))
select who from holders where pg_terminate_backend(pid)
