-- Every table of a subscription (oid $1) with its state: i not begun, d being copied, f copied, s caught up, r ready.
-- Servers 13 and later.
select n.nspname as schema, c.relname as name, r.srsubstate::text as state
from pg_subscription_rel r
join pg_class c on c.oid = r.srrelid
join pg_namespace n on n.oid = c.relnamespace
where r.srsubid = $1
order by 1, 2
