-- Whom the creation of a logical slot waits for: transactions that have an id, in any database, but the one that creates
-- it ($1). Prepared transactions too. Servers 13 and later.
select format('pid %s, user %s, database %s, application %s, %s, transaction open for %s s', a.pid, a.usename, a.datname,
              coalesce(nullif(a.application_name, ''), '-'), a.state,
              round(extract(epoch from clock_timestamp() - a.xact_start)))
from pg_stat_activity a
where a.backend_xid is not null and a.pid <> $1 and a.pid <> pg_backend_pid()
union all
select format('prepared transaction %L, owner %s, database %s', p.gid, p.owner, p.database)
from pg_prepared_xacts p
