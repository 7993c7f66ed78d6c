-- Which of these transactions ($1, all that were open when the fence was up) are still open in this database. Table
-- triggers don't stop what such a one may yet commit: DDL, a table it created itself, large objects, COMMIT PREPARED.
-- Autovacuum and replication are let be: the first writes no rows, the second is what the flip waits for. Servers 13+.
select coalesce(
         (select format('server process %s of %s (%s, %s)', a.pid, coalesce(a.usename, '?'),
                        coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, '?'))
            from pg_stat_activity a where a.backend_xid = open.xid::xid),
         (select format('prepared transaction %L', p.gid) from pg_prepared_xacts p where p.transaction = open.xid::xid),
         format('transaction %s', open.xid))
  from (select x as xid from pg_snapshot_xip(pg_current_snapshot()) as x) as open
 where open.xid::text = any ($1)
   and not exists (select from pg_stat_activity a
                    where a.backend_xid = open.xid::xid
                      and (a.datname is distinct from current_database()
                           or a.backend_type in ('autovacuum worker', 'walsender')
                           or a.backend_type like 'logical replication %'))
   and not exists (select from pg_prepared_xacts p
                    where p.transaction = open.xid::xid and p.database <> current_database())
