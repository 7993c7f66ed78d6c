-- Transactions that have written something and are older than $1 seconds, in this database: a flip that starts now would
-- wait for them while clients are held, and a large one costs seconds of applying after its commit. Servers 13+.
select format('session %s of %s (%s, %s) for %s s', a.pid, coalesce(a.usename, '?'),
              coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, '?'),
              round(extract(epoch from clock_timestamp() - a.xact_start))::bigint)
  from pg_stat_activity a
 where a.datname = current_database() and a.backend_xid is not null
   and a.xact_start < clock_timestamp() - $1 * interval '1 second'
   and a.backend_type not in ('autovacuum worker', 'walsender') and a.backend_type not like 'logical replication %'
 order by a.xact_start limit 5
