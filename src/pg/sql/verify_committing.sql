-- Of the transactions $2, which had locks on table $1 a moment ago: those that still have, and whose session is not idle and has
-- an xid. One that is idle in its transaction, or that has none, had no commit under way when this was asked. Servers 13 and later.
select coalesce(pg_catalog.array_agg(distinct l.virtualtransaction), '{}')
from pg_catalog.pg_locks l
left join pg_catalog.pg_stat_activity a on a.pid = l.pid
where l.locktype = 'relation' and l.relation = pg_catalog.to_regclass($1) and l.granted
  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
  and l.virtualtransaction = any ($2)
  -- Of a prepared transaction, and of sessions that may not be looked at, there is no state.
  and (a.state is null or a.state not like 'idle in transaction%' and a.backend_xid is not null)
