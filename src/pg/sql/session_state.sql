-- Everything of a session that a transfer has to take along, and what it can't. Runs in the session itself, behind
-- session_limits.sql. $1: names of custom settings, separated by chr(1). Operators and functions are qualified because the
-- session's search_path may be anything. Columns: kind, then what belongs to it. Servers 13 and later.
-- What the session has set; and what its login has, or has not, given it by ALTER ROLE and ALTER DATABASE: that may have been
-- changed since, and the new connection is a new login.
select case s.source when 'session' then 'setting' else 'default' end, s.name, pg_catalog.current_setting(s.name),
       null::pg_catalog.text, null::pg_catalog.text
  from pg_catalog.pg_settings s
 where (s.source OPERATOR(pg_catalog.=) 'session' and s.context OPERATOR(pg_catalog.<>) 'internal'
        -- The client's encoding is what the client knows of it.
        or s.context OPERATOR(pg_catalog.=) 'user' and s.name OPERATOR(pg_catalog.<>) 'client_encoding'
           and (s.source OPERATOR(pg_catalog.=) any (array['database', 'user', 'database user'])
                or s.source OPERATOR(pg_catalog.<>) 'client'
                   and exists (select from pg_catalog.pg_db_role_setting d, pg_catalog.unnest(d.setconfig) c (setting)
                                where d.setrole OPERATOR(pg_catalog.=) any (array[0, (select r.oid from pg_catalog.pg_roles r
                                          where r.rolname OPERATOR(pg_catalog.=) session_user)]::pg_catalog.oid[])
                                  and d.setdatabase OPERATOR(pg_catalog.=) any (array[0, (select b.oid
                                          from pg_catalog.pg_database b
                                         where b.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())]::pg_catalog.oid[])
                                  and pg_catalog.lower(pg_catalog.split_part(c.setting, '=', 1))
                                      OPERATOR(pg_catalog.=) pg_catalog.lower(s.name))))
   and s.name OPERATOR(pg_catalog.<>) all (array[
         'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout',
         'transaction_isolation', 'transaction_read_only', 'transaction_deferrable',
         'session_authorization', 'role', 'is_superuser'])
union all
select distinct 'setting', n.name, pg_catalog.current_setting(n.name, true), null, null
  from pg_catalog.unnest(pg_catalog.string_to_array($1, pg_catalog.chr(1))) n (name)
 where pg_catalog.current_setting(n.name, true) is not null
   and not exists (select from pg_catalog.pg_settings s where s.name OPERATOR(pg_catalog.=) n.name)
union all
select 'session_user', session_user::pg_catalog.text, null, null, null
union all
select 'role', pg_catalog.current_setting('role'), null, null, null
union all
select 'statement', s.name, s.statement, case when s.from_sql then 'sql' else 'protocol' end,
       (select pg_catalog.string_agg(
                 case when p.type OPERATOR(pg_catalog.<) 10000::pg_catalog.oid then p.type::pg_catalog.text
                      else (select pg_catalog.concat(n.nspname, pg_catalog.chr(1), t.typname)
                              from pg_catalog.pg_type t
                              join pg_catalog.pg_namespace n on n.oid OPERATOR(pg_catalog.=) t.typnamespace
                             where t.oid OPERATOR(pg_catalog.=) p.type) end,
                 pg_catalog.chr(2) order by p.n)
          from pg_catalog.unnest(s.parameter_types::pg_catalog.oid[]) with ordinality p (type, n))
  from pg_catalog.pg_prepared_statements s
 where pg_catalog.left(s.name, 7) OPERATOR(pg_catalog.<>) 'pgflip:'
union all
-- Tables, views and sequences: see temporary_objects.sql.
select 'temporary', pg_catalog.pg_my_temp_schema()::pg_catalog.text, null, null, null
 where pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
   and exists (select from pg_catalog.pg_class c
                where c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
                  and c.relkind OPERATOR(pg_catalog.<>) all (array['i', 'I', 't']::pg_catalog."char"[]))
union all
select 'obstacle', 'temporary functions', p.proname::pg_catalog.text, null, null
  from pg_catalog.pg_proc p
 where pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
   and p.pronamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
union all
select 'obstacle', 'temporary types', t.typname::pg_catalog.text, null, null
  from pg_catalog.pg_type t
 where pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
   and t.typnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
   and t.typrelid OPERATOR(pg_catalog.=) 0::pg_catalog.oid
   and t.typelem OPERATOR(pg_catalog.=) 0::pg_catalog.oid
union all
select 'obstacle', 'temporary objects of other kinds',
       pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid), null, null
  from pg_catalog.pg_depend d
 where pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
   and d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass::pg_catalog.oid
   and d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
   and d.classid OPERATOR(pg_catalog.<>) all (array['pg_catalog.pg_class', 'pg_catalog.pg_type', 'pg_catalog.pg_proc',
         'pg_catalog.pg_constraint']::pg_catalog.regclass[]::pg_catalog.oid[])
union all
select 'listen', l.channel, null, null, null
  from pg_catalog.pg_listening_channels() l (channel)
union all
select 'cursor', c.name, c.is_binary::pg_catalog.text, c.is_scrollable::pg_catalog.text, null
  from pg_catalog.pg_cursors c
 where c.is_holdable
union all
select 'lock', l.classid::pg_catalog.text, l.objid::pg_catalog.text, l.objsubid::pg_catalog.text, l.mode
  from pg_catalog.pg_locks l
 where l.locktype OPERATOR(pg_catalog.=) 'advisory'
   and l.granted
   and l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
