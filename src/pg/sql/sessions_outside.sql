-- What binds sessions to their server, as far as it is seen from outside. $1: pids of server processes in this database.
-- Columns: pid, kind, what, since when in seconds (null: not known). Of temporary objects see sessions_temporary.sql.
-- Servers 13 and later.
with locks as materialized (
    select pid, granted, mode, database, classid, objid, objsubid,
           case objsubid when 1 then ((classid::int8 << 32) | objid::int8)::text
                         else classid::int4 || ', ' || objid::int4 end as key
      from pg_locks where locktype = 'advisory'),
activity as materialized (
    select pid, state, backend_type, extract(epoch from clock_timestamp() - xact_start)::float8 as xact_s,
           extract(epoch from clock_timestamp() - query_start)::float8 as query_s
      from pg_stat_activity where pid = any ($1))
select pid, 'lock' as kind, key || case mode when 'ShareLock' then ' (shared)' else '' end as what, null::float8 as since_s
  from locks
 where granted and pid = any ($1)
union all
select w.pid, 'wait', w.key || coalesce(' of process ' || string_agg(distinct h.pid::text, ', '), ''), a.query_s
  from locks w
  join activity a on a.pid = w.pid
  left join locks h on h.granted and h.pid <> w.pid
   and (h.database, h.classid, h.objid, h.objsubid) = (w.database, w.classid, w.objid, w.objsubid)
 where not w.granted
 group by w.pid, w.key, a.query_s
union all
select pid, 'replication', null, null from activity where backend_type = 'walsender'
union all
select pid, 'transaction', state, xact_s from activity where xact_s is not null
order by 1, 2, 3
