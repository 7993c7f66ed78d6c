-- Who is connected to these databases ($1) and is neither pgflip itself nor replication. Servers 13+.
select format('session %s of %s@%s (%s, %s)', a.pid, coalesce(a.usename, '?'), coalesce(a.datname, '?'),
              coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, '?'))
  from pg_stat_activity a
 where a.datname = any ($1) and a.backend_type = 'client backend' and a.application_name not like 'pgflip:%'
 order by a.backend_start
