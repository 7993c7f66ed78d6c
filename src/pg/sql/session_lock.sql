-- Takes an advisory lock for the session, $5 times, without waiting: classid, objid, objsubid and mode as pg_locks shows them.
-- True if it has been taken each time. The session's search_path may be anything. Servers 13 and later.
select pg_catalog.bool_and(
         case when $3 OPERATOR(pg_catalog.=) 1::pg_catalog.int2
              then case when $4 OPERATOR(pg_catalog.=) 'ShareLock'
                        then pg_catalog.pg_try_advisory_lock_shared(
                               ($1::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) $2::pg_catalog.int8)
                        else pg_catalog.pg_try_advisory_lock(
                               ($1::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) $2::pg_catalog.int8) end
              else case when $4 OPERATOR(pg_catalog.=) 'ShareLock'
                        then pg_catalog.pg_try_advisory_lock_shared($1::pg_catalog.int4, $2::pg_catalog.int4)
                        else pg_catalog.pg_try_advisory_lock($1::pg_catalog.int4, $2::pg_catalog.int4) end
         end)
  from pg_catalog.generate_series(1::pg_catalog.int8, $5)
