-- Active side's carrier: verification $1 at epoch $2 is kept by this session, and nothing of it is yet. Servers 13 and later.
insert into pgflip.verification (id, n, epoch, place, pid, backend_start)
select $1, 0, $2, '', a.pid, a.backend_start
from pg_catalog.pg_stat_activity a
where a.pid = pg_catalog.pg_backend_pid()
