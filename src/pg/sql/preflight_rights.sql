-- What pgflip's own role may do here; each column has to be true for a role that is no superuser. pg_has_role of a role
-- that does not exist (before 16) is asked for nothing. Servers 13 and later.
select current_database()::text as database,
       r.rolsuper as superuser,
       r.rolreplication as replication,
       r.rolcreaterole as createrole,
       r.rolcreatedb as createdb,
       coalesce((select pg_has_role(p.oid, 'USAGE') from pg_roles p where p.rolname = 'pg_create_subscription'), false)
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
       pg_has_role('pg_signal_backend', 'USAGE') as signal,
       pg_has_role('pg_read_all_stats', 'USAGE') as read_stats
from pg_roles r
where r.rolname = current_user
