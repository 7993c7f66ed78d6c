-- For each worker the ports of the servers that took its writes, each time that they changed.
with numbered as (
    select split_part(id, '/', 1) as driver, split_part(id, '/', 2)::int as worker, n, port,
        lag(port) over (partition by split_part(id, '/', 1), split_part(id, '/', 2) order by n) as before
    from public.driver_ledger
)
select driver, worker, array_agg(port order by n) from numbered
where port is distinct from before
group by driver, worker
