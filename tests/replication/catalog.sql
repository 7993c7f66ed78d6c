select 'relation ' || c.oid::regclass::text || ' ' || c.relkind::text from pg_class c where c.oid >= 16384 and c.relkind <> 't' and c.relname !~ '^pg_toast'
union all select 'trigger ' || tgname || ' on ' || tgrelid::regclass::text || tgenabled::text from pg_trigger where not tgisinternal
union all select 'function ' || oid::regprocedure::text from pg_proc where oid >= 16384
union all select 'schema ' || nspname from pg_namespace where nspname !~ '^pg_(toast|temp)'
union all select 'event trigger ' || evtname from pg_event_trigger
union all select 'publication ' || pubname from pg_publication
union all select 'subscription ' || subname from pg_subscription
union all select 'slot ' || slot_name from pg_replication_slots
union all select 'origin ' || roname from pg_replication_origin
union all select 'setting ' || setdatabase || ' ' || setrole || ' ' || setconfig::text from pg_db_role_setting
union all select 'role ' || rolname from pg_roles
order by 1
