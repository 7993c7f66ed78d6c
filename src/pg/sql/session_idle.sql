-- How long the server lets this session be idle, in milliseconds; 0: for ever. Nothing before 14. The session's search_path
-- may be anything. Servers 13 and later.
select s.setting from pg_catalog.pg_settings s where s.name OPERATOR(pg_catalog.=) 'idle_session_timeout'
