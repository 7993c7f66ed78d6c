-- Everything of a session that a transfer has to take along. Runs in the session itself, behind session_limits.sql; while
-- sessions are held each waits for all, so it asks the functions below the views, and what few sessions have is asked for
-- apart: custom settings (session_custom.sql goes behind it) and temporary objects (session_temporary.sql). Operators and
-- functions are qualified because the session's search_path may be anything. $1: see session_custom.sql. Columns: kind, then
-- what belongs to it. Servers 13 and later.
-- What the session has set; and what its login has, or has not, given it by ALTER ROLE and ALTER DATABASE: that may have been
-- changed since, and the new connection is a new login.
select case s.source when 'session' then 'setting' else 'default' end, s.name, pg_catalog.current_setting(s.name),
       null::pg_catalog.text, null::pg_catalog.text
  from pg_catalog.pg_show_all_settings() s
 where (s.source OPERATOR(pg_catalog.=) 'session' and s.context OPERATOR(pg_catalog.<>) 'internal'
        -- The client's encoding is what the client knows of it.
        or s.context OPERATOR(pg_catalog.=) 'user' and s.name OPERATOR(pg_catalog.<>) 'client_encoding'
           and (s.source OPERATOR(pg_catalog.=) any (array['database', 'user', 'database user'])
                or s.source OPERATOR(pg_catalog.<>) 'client'
                   and pg_catalog.lower(s.name) OPERATOR(pg_catalog.=) any (array(
                         select pg_catalog.lower(pg_catalog.split_part(c.setting, '=', 1))
                           from pg_catalog.pg_db_role_setting d, pg_catalog.unnest(d.setconfig) c (setting)
                          where d.setrole OPERATOR(pg_catalog.=) any (array[0,
                                  pg_catalog.to_regrole(pg_catalog.quote_ident(session_user))::pg_catalog.oid]::pg_catalog.oid[])
                            and d.setdatabase OPERATOR(pg_catalog.=) any (array[0, (select b.oid from pg_catalog.pg_database b
                                  where b.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())]::pg_catalog.oid[])))))
   and s.name OPERATOR(pg_catalog.<>) all (array[
         'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout',
         'transaction_isolation', 'transaction_read_only', 'transaction_deferrable',
         'session_authorization', 'role', 'is_superuser'])
union all
-- The last: the OID of its schema for temporary objects, 0 if it has none.
select 'own', session_user::pg_catalog.text, pg_catalog.current_setting('role'),
       pg_catalog.pg_my_temp_schema()::pg_catalog.text, null
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
  from pg_catalog.pg_prepared_statement() s
 where pg_catalog.left(s.name, 7) OPERATOR(pg_catalog.<>) 'pgflip:'
union all
select 'listen', l.channel, null, null, null
  from pg_catalog.pg_listening_channels() l (channel)
union all
select 'cursor', c.name, c.is_binary::pg_catalog.text, c.is_scrollable::pg_catalog.text, null
  from pg_catalog.pg_cursor() c
 where c.is_holdable
union all
select 'lock', l.classid::pg_catalog.text, l.objid::pg_catalog.text, l.objsubid::pg_catalog.text, l.mode
  from pg_catalog.pg_lock_status() l
 where l.locktype OPERATOR(pg_catalog.=) 'advisory'
   and l.granted
   and l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
