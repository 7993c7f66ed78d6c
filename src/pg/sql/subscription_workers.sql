-- Pids of every process that works for a subscription ($1): apply, parallel apply, initial copies. Servers 13 and later.
select w.pid
from pg_stat_subscription w
where w.subname = $1 and w.pid is not null
