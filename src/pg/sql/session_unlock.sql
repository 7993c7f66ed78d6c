-- Gives back every advisory lock of this session and says how often each was held: pg_locks shows it once, however often it
-- was taken. Row n of "u" is there if n unlocks have found it held; the one that did not is the last, and a warning.
-- Columns: classid, objid, objsubid, mode, count. The session's search_path may be anything. Servers 13 and later.
with held as materialized (
    select l.classid, l.objid, l.objsubid, l.mode
      from pg_catalog.pg_locks l
     where l.locktype OPERATOR(pg_catalog.=) 'advisory'
       and l.granted
       and l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())
select h.classid, h.objid, h.objsubid, h.mode,
       (with recursive u (n, more) as (
            select 0::pg_catalog.int8, case
                when h.objsubid OPERATOR(pg_catalog.=) 1::pg_catalog.int2 and h.mode OPERATOR(pg_catalog.=) 'ShareLock'
                then pg_catalog.pg_advisory_unlock_shared(
                       (h.classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) h.objid::pg_catalog.int8)
                when h.objsubid OPERATOR(pg_catalog.=) 1::pg_catalog.int2
                then pg_catalog.pg_advisory_unlock(
                       (h.classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) h.objid::pg_catalog.int8)
                when h.mode OPERATOR(pg_catalog.=) 'ShareLock'
                then pg_catalog.pg_advisory_unlock_shared(h.classid::pg_catalog.int4, h.objid::pg_catalog.int4)
                else pg_catalog.pg_advisory_unlock(h.classid::pg_catalog.int4, h.objid::pg_catalog.int4) end
            union all
            select u.n OPERATOR(pg_catalog.+) 1, case
                when h.objsubid OPERATOR(pg_catalog.=) 1::pg_catalog.int2 and h.mode OPERATOR(pg_catalog.=) 'ShareLock'
                then pg_catalog.pg_advisory_unlock_shared(
                       (h.classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) h.objid::pg_catalog.int8)
                when h.objsubid OPERATOR(pg_catalog.=) 1::pg_catalog.int2
                then pg_catalog.pg_advisory_unlock(
                       (h.classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) h.objid::pg_catalog.int8)
                when h.mode OPERATOR(pg_catalog.=) 'ShareLock'
                then pg_catalog.pg_advisory_unlock_shared(h.classid::pg_catalog.int4, h.objid::pg_catalog.int4)
                else pg_catalog.pg_advisory_unlock(h.classid::pg_catalog.int4, h.objid::pg_catalog.int4) end
              from u where u.more)
        select pg_catalog.max(u.n) from u)
  from held h
