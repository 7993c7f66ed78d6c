-- Active side's carrier: verification $1 is not kept any more; $2: nor are others that nobody is at. Servers 13 and later.
delete from pgflip.verification v
where v.id = $1
   or $2 and not exists (
     select from pgflip.verification h
     join pg_catalog.pg_stat_activity a on a.pid = h.pid and a.backend_start = h.backend_start
     where h.id = v.id and h.n = 0)
