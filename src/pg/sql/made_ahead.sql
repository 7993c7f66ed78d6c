-- What `replication start` made ahead, on the source: the statements that say whom it belongs to (then there were no roles
-- yet) and what domains were made without. Schemas come first: whom a type goes to must be allowed to make things in its
-- schema. $1: OIDs of types, $2: of schemas. Servers 13 and later.
select statement
from (select 1, format('alter schema %I owner to %I', n.nspname, r.rolname)
      from pg_namespace n join pg_roles r on r.oid = n.nspowner
      where n.oid = any ($2)
      union all
      select 2, format('alter type %s owner to %I', t.oid::regtype, r.rolname)
      from pg_type t join pg_roles r on r.oid = t.typowner
      where t.oid = any ($1)
      union all
      select 3, format('alter domain %s set not null', t.oid::regtype)
      from pg_type t
      where t.oid = any ($1) and t.typtype = 'd' and t.typnotnull) all_of_them (n, statement)
order by n
