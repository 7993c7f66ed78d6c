-- At most $2 changes or a transaction more than that (what pgoutput says of them), from where slot $1 stands, which moves behind them.
-- Of each message the first $3 bytes, and how many it has. Servers 13 and later.
select pg_catalog.substring(data, 1, $3) as data, pg_catalog.length(data) as bytes
from pg_catalog.pg_logical_slot_get_binary_changes($1, null, $2, 'proto_version', '1', 'publication_names', 'pgflip')
