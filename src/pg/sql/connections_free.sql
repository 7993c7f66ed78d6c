-- How many more sessions of clients this server has room for at most, and its max_connections. What is kept back for
-- superusers is not taken off, as some clients may be; sessions of pgflip's own come and go. Servers 13+.
select current_setting('max_connections')::int8
       - (select count(*) from pg_stat_activity
           where backend_type = 'client backend' and application_name not like 'pgflip: %') as free,
       current_setting('max_connections')::int8 as max
