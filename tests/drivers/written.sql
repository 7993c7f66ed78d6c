-- Of the ids that drivers were told are committed ($1): how many are lost, and doubled; of how many rows nobody was told; and
-- the ids whose values are not the sample's. Rows without an enum have no values; not every driver has composites.
with ledger as (
    select id, count(*) as times from public.driver_ledger group by id
), both_ways as (
    select a.id as acknowledged, l.id as written, l.times from unnest($1::text[]) as a (id) full join ledger l using (id)
)
select count(*) filter (where written is null),
    count(*) filter (where times > 1),
    count(*) filter (where acknowledged is null),
    (select coalesce(array_agg(l.id), '{}') from public.driver_ledger l, public.driver_sample s
     where l.mood is not null and ((l.mood, l.moods, l.tags) is distinct from (s.mood, s.moods, s.tags)
         or num_nonnulls(l.place, l.places) > 0 and (l.place, l.places) is distinct from (s.place, s.places)))
from both_ways
