-- Who holds an advisory lock of this database: classid, objid, objsubid as pg_locks shows them. The session's search_path may
-- be anything. Servers 13 and later.
select distinct l.pid, a.usename
  from pg_catalog.pg_locks l
  join pg_catalog.pg_database d
    on d.oid OPERATOR(pg_catalog.=) l.database
   and d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
  left join pg_catalog.pg_stat_activity a on a.pid OPERATOR(pg_catalog.=) l.pid
 where l.locktype OPERATOR(pg_catalog.=) 'advisory'
   and l.granted
   and l.classid OPERATOR(pg_catalog.=) $1
   and l.objid OPERATOR(pg_catalog.=) $2
   and l.objsubid OPERATOR(pg_catalog.=) $3
   and l.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()
