-- How many more sessions of clients this server has room for, and its max_connections. What is kept back for superusers
-- counts as taken (reserved_connections: from 16 on); sessions of pgflip's own that are idle come and go. Servers 13+.
select current_setting('max_connections')::int8
       - current_setting('superuser_reserved_connections')::int8
       - coalesce(current_setting('reserved_connections', true)::int8, 0)
       - (select count(*) from pg_stat_activity
           where backend_type = 'client backend' and application_name not like 'pgflip: %') as free,
       current_setting('max_connections')::int8 as max
