-- Transactions of clients that have been open for more than a minute in these databases ($1). Servers 13 and later.
select format('pid %s, user %s, database %s, application %s, %s, open for %s s', a.pid, a.usename, a.datname,
              coalesce(nullif(a.application_name, ''), '-'), a.state,
              round(extract(epoch from clock_timestamp() - a.xact_start))) as who
from pg_stat_activity a
where a.backend_type = 'client backend' and a.datname = any ($1) and a.pid <> pg_backend_pid()
  and a.xact_start < clock_timestamp() - interval '1 minute'
order by a.xact_start
