-- What pgflip's own role may do here; each column has to be true for a role that is no superuser. pg_has_role of a role
-- that does not exist (before 16) is asked for nothing. Servers 13 and later.
select current_database()::text as database,
       r.rolsuper as superuser,
       r.rolreplication as replication,
       r.rolcreaterole as createrole,
       r.rolcreatedb as createdb,
       coalesce((select pg_has_role(p.oid, 'MEMBER') from pg_roles p where p.rolname = 'pg_create_subscription'), false)
           as create_subscription,
       has_database_privilege(current_database(), 'CREATE') as create_in_database,
       has_table_privilege('pg_authid', 'SELECT') as read_verifiers,
       has_function_privilege('pg_replication_origin_create(text)', 'EXECUTE')
           and has_function_privilege('pg_replication_origin_drop(text)', 'EXECUTE')
           and has_function_privilege('pg_replication_origin_session_setup(text)', 'EXECUTE')
           and has_function_privilege('pg_replication_origin_advance(text, pg_lsn)', 'EXECUTE')
           and has_function_privilege('pg_replication_origin_session_is_setup()', 'EXECUTE')
           and has_function_privilege('pg_replication_origin_oid(text)', 'EXECUTE')
           and has_function_privilege('pg_show_replication_origin_status()', 'EXECUTE') as origins,
       pg_has_role('pg_signal_backend', 'MEMBER') as signal,
       not exists (select from pg_class c
                   where c.relkind in ('r', 'p') and c.oid >= 16384 and c.relpersistence = 'p'
                     and not pg_has_role(c.relowner, 'MEMBER')) as owns_tables
from pg_roles r
where r.rolname = current_user
