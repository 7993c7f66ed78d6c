-- What a server has room for, and what of it is taken; what pgflip already has there (its slots, its subscriptions'
-- workers and origins) counts as its own. Databases of this config: $1. Servers 13 and later.
with mine as (
    select s.oid from pg_subscription s join pg_database d on d.oid = s.subdbid
    where s.subname ~ '^pgflip_to_' and d.datname = any ($1)
)
select current_setting('wal_level') as wal_level,
       pg_is_in_recovery() as in_recovery,
       current_setting('max_replication_slots')::int as slots_max,
       (select count(*)::int from pg_replication_slots) as slots,
       (select count(*)::int from pg_replication_slots where slot_name ~ '^pgflip_to_') as slots_mine,
       current_setting('max_wal_senders')::int as senders_max,
       (select count(*)::int from pg_stat_replication) as senders,
       (select count(*)::int from pg_stat_replication where application_name ~ '^pgflip_to_') as senders_mine,
       current_setting('max_logical_replication_workers')::int as appliers_max,
       (select count(*)::int from pg_stat_subscription where pid is not null) as appliers,
       (select count(*)::int from pg_stat_subscription where pid is not null and subid in (select oid from mine)) as appliers_mine,
       current_setting('max_worker_processes')::int as workers_max,
       (select count(*)::int from pg_stat_activity
        where backend_type not in ('client backend', 'autovacuum launcher', 'autovacuum worker', 'background writer',
                                   'checkpointer', 'walwriter', 'walsender', 'walreceiver', 'startup', 'archiver',
                                   'stats collector', 'walsummarizer', 'slotsync worker', 'io worker')) as workers,
       current_setting($2)::int as origins_max,
       current_setting('max_sync_workers_per_subscription')::int as sync_workers,
       current_setting('max_slot_wal_keep_size') as wal_keep,
       coalesce(current_setting('idle_replication_slot_timeout', true), '0') as idle_slot_timeout,
       current_setting('max_locks_per_transaction')::bigint
           * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint) as locks_max,
       (select count(*)::int from pg_replication_slots
        where slot_type = 'logical' and slot_name !~ '^pgflip_to_' and not temporary and slot_name !~ '_sync_') as others_slots
