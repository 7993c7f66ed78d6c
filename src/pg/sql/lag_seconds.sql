-- On a link's source: age of its own ($1) newest marker, whether that is the one the target has seen last ($2, at $3),
-- and how old that one is. Ages by this server's clock, which also wrote the times. Servers 13 and later.
with newest as (
    select n, at from pgflip.marker where side = $1 order by at desc, n limit 1
)
select (select extract(epoch from clock_timestamp() - at)::float8 from newest) as newest_age,
       (select n = $2::bigint from newest) as newest_seen,
       extract(epoch from clock_timestamp() - $3::text::timestamptz)::float8 as seen_age
