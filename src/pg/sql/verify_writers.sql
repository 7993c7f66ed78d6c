-- Transactions that may have written to table $1 (its quoted name), by their virtual ids; not this session's. Servers 13 and later.
select coalesce(pg_catalog.array_agg(distinct l.virtualtransaction), '{}')
from pg_catalog.pg_locks l
where l.locktype = 'relation' and l.relation = pg_catalog.to_regclass($1) and l.granted
  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
  and l.pid is distinct from pg_catalog.pg_backend_pid()
  and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
