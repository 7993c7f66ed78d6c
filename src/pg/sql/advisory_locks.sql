-- Advisory locks held on the server: by whom, in which database, which key, shared or not. Servers 13 and later.
select l.pid, coalesce(d.datname, '')::text as database,
       case l.objsubid when 1 then ((l.classid::int8 << 32) | l.objid::int8)::text
                       else l.classid::int4 || ', ' || l.objid::int4 end as key,
       l.mode = 'ShareLock' as shared,
       coalesce(a.usename, '?')::text as usename, coalesce(a.application_name, '') as application
  from pg_locks l
  left join pg_database d on d.oid = l.database
  left join pg_stat_activity a on a.pid = l.pid
 where l.locktype = 'advisory' and l.granted
