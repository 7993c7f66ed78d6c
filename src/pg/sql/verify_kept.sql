-- Active side's carrier: the verification that is kept (of several the newest), and whether the session that keeps it is still there. Servers 13 and later.
select v.epoch, v.place,
       exists (select from pg_catalog.pg_stat_activity a where a.pid = v.pid and a.backend_start = v.backend_start) as live
from pgflip.verification v
where v.n = 0
order by v.at desc
limit 1
