-- Ends sessions that hold the operator's lock ($1) and have said nothing for five seconds: one that lives says something
-- twice a second. Safety does not rest on that lock. Servers 13+.
select pg_terminate_backend(l.pid)
  from pg_locks l join pg_stat_activity a on a.pid = l.pid
 where l.locktype = 'advisory' and l.granted and l.objsubid = 1
   and l.database = (select oid from pg_database where datname = current_database())
   and l.classid::bigint = $1::bigint >> 32 and l.objid::bigint = $1::bigint & 4294967295
   and a.state_change < clock_timestamp() - interval '5 seconds'
