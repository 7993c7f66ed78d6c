-- Physical standbys of this server that a commit does not wait for: who is neither one of logical replication (all of
-- which have a slot) nor a backup or an archive of the WAL. Servers 13 and later.
select format('%s%s (%s)', coalesce(nullif(r.application_name, ''), 'unnamed'), ' at ' || host(r.client_addr), r.sync_state)
from pg_stat_replication r
where not exists (select from pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical')
  and r.state in ('startup', 'catchup', 'streaming')
  and r.application_name !~ '^(pg_receivewal|pg_basebackup|pgflip_to_)'
  and r.sync_state not in ('sync', 'quorum')
order by 1
