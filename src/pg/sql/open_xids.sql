-- Transactions of this database that are older than $1 seconds and would keep a flip that starts now from draining: those
-- that have written something, whoever they are (a large one costs seconds of applying after its commit), and those of
-- clients of pgflip's ($2: their server sessions) that are idle in a transaction or have run for as long as that. With
-- $3 those clients are left to the steps that follow, which end them. ANALYZE and VACUUM have a transaction for each table,
-- though xact_start shows when the statement began. Servers 13+.
select a.pid, format('of %s (%s, %s) for %s s', coalesce(a.usename, '?'),
              coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, '?'),
              round(extract(epoch from clock_timestamp() - a.xact_start))::bigint)
  from pg_stat_activity a
 where a.datname = current_database()
   and (a.backend_xid is not null and not (a.pid = any ($2) and $3) or a.pid = any ($2) and not $3)
   and not (a.state = 'active' and a.query ~* '^\s*(analyze|vacuum)\M')
   and a.xact_start < clock_timestamp() - $1 * interval '1 second'
   and a.backend_type not in ('autovacuum worker', 'walsender') and a.backend_type not like 'logical replication %'
 order by a.xact_start limit 5
