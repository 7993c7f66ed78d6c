-- How long the server lets this session be idle, in milliseconds; 0: for ever; null before 14. As in session_limits.sql. The
-- session's search_path may be anything. Servers 13 and later.
select (extract(epoch from pg_catalog.current_setting('idle_session_timeout', true)::pg_catalog.interval)
        OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8::pg_catalog.text
