-- Active side's carrier: where verification $1 stands ($2; null: as before), and the reports $4 behind the first $3. False: it is not this session's
-- any more, and nothing is written. Servers 13 and later.
with head as (
  update pgflip.verification set place = coalesce($2, place), at = pg_catalog.clock_timestamp()
  where id = $1 and n = 0 and pid = pg_catalog.pg_backend_pid()
  returning epoch
), new as (
  insert into pgflip.verification (id, n, epoch, place)
  select $1, $3 + r.n::pg_catalog.int4, head.epoch, r.report
  from head, unnest($4::pg_catalog.text[]) with ordinality r (report, n)
)
select exists (select from head)
