-- Every table that the fence has to stand before, and how its trigger is: null (none), O, D, R or A. Servers 13+.
-- Parents and leaves alike: a write to a partition fires only its own statement trigger. Not temporary tables, not the
-- system's, not pgflip's own; foreign tables and materialized views hold nothing that a link carries.
select c.oid, n.nspname, c.relname, t.tgenabled::text
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
  left join pg_trigger t on t.tgrelid = c.oid and t.tgname = 'pgflip_fence'
                        and t.tgfoid = 'pgflip.fence()'::regprocedure
 where c.relkind in ('r', 'p') and c.relpersistence <> 't'
   and n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'pgflip')
   and c.relnamespace not in (select oid from pg_namespace where nspname like 'pg\_temp\_%' or nspname like 'pg\_toast\_temp\_%')
 order by c.oid
