-- A logical slot ($1) as its server sees it. No row: it does not exist. Servers 13 and later.
select s.active, s.active_pid, s.plugin::text as plugin, s.database::text as database, s.wal_status,
       s.restart_lsn, s.confirmed_flush_lsn, pg_current_wal_lsn() as now_lsn
from pg_replication_slots s
where s.slot_name = $1
