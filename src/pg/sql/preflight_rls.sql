-- Tables that a link does not carry because of row level security, of those that are to be published
-- (tables_to_publish.sql), and why:
--   forced  its owner is subject to it: from 16 on a link writes as the owner, and the server refuses that
--   hidden  pgflip's own role is subject to it: the initial copy would be of the rows that policies show to it
-- Servers 13 and later.
select n.nspname as schema, c.relname as name, pg_get_userbyid(c.relowner)::text as owner,
       c.relforcerowsecurity and not o.rolsuper and not o.rolbypassrls as forced, row_security_active(c.oid) as hidden
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
join pg_roles o on o.oid = c.relowner
where c.relkind = 'r' and c.relpersistence = 'p' and c.oid >= 16384 and c.relrowsecurity
  and n.nspname not in ('pg_catalog', 'information_schema', 'pgflip') and n.nspname !~ '^pg_(toast|temp)'
  and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
order by 1, 2
