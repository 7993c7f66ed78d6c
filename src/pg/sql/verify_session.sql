-- A session that reads rows to compare them: what their text depends on is the same on both servers, and nothing is left out.
set session characteristics as transaction isolation level read committed;
set timezone = 'UTC';
set datestyle = 'ISO, YMD';
set intervalstyle = 'postgres';
set extra_float_digits = 3;
set bytea_output = 'hex';
set lc_monetary = 'C';
set xmlbinary = 'base64';
set search_path = 'pg_catalog';
set quote_all_identifiers = off;
set row_security = off;
set jit = off;
set max_parallel_workers_per_gather = 0;
set array_nulls = on;
-- Those of them that this version has: sessions wait for each other here.
select pg_catalog.set_config(s.name, '0', false)
from pg_catalog.pg_settings s
where s.name in ('statement_timeout', 'lock_timeout', 'idle_session_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')
