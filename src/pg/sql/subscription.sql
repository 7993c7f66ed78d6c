-- A subscription of this database ($1) and its leading apply worker. to_jsonb: leader_pid is there from 16 on only, and
-- is what tells a parallel worker from the leading one. Servers 13 and later.
select s.oid, s.subenabled, s.subslotname::text as slot, s.subpublications::text[] as publications,
       (select w.pid from pg_stat_subscription w
        where w.subid = s.oid and w.pid is not null and w.relid is null
          and (to_jsonb(w) ->> 'leader_pid') is null) as worker
from pg_subscription s
where s.subdbid = (select oid from pg_database where datname = current_database())
  and s.subname = $1
