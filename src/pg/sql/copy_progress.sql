-- Initial copies under way in this database. Servers 14 and later.
select n.nspname as schema, c.relname as name, p.bytes_processed as bytes, p.tuples_processed as rows
from pg_stat_progress_copy p
join pg_class c on c.oid = p.relid
join pg_namespace n on n.oid = c.relnamespace
where p.datname = current_database() and p.command = 'COPY FROM' and p.type = 'CALLBACK'
