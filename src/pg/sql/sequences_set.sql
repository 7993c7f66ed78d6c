-- Target: moves sequences ($3 oids, $4 values, $5 is_called, $6 exactly or only forward, $7 increments), all at once and
-- only as this attempt ($2) on a standby at this epoch ($1). The claim notes the attempt on the target, so that an older
-- one that wakes later changes nothing; its row lock keeps the pivot out meanwhile. Servers 13+.
with claim as (
    update pgflip.state set attempt = greatest(attempt, $2), changed_at = clock_timestamp()
     where epoch = $1 and state = 'standby' and attempt <= $2 and burnt < $2
    returning 1
)
select (select count(*) from claim) as claimed,
       (select count(setval(w.o::regclass, w.v, w.c))
          from unnest($3::oid[], $4::bigint[], $5::boolean[], $6::boolean[], $7::bigint[]) as w (o, v, c, exactly, inc)
         where exists (select from claim)
           and (w.exactly
                or coalesce(case when w.inc > 0 then w.v > pg_sequence_last_value(w.o)
                                 else w.v < pg_sequence_last_value(w.o) end, true))) as moved
