-- Target: which tables a subscription ($1) carries, by OID, and how many of them are not in step yet. Servers 13+.
select count(*) as tables, count(*) filter (where r.srsubstate <> 'r') as unready,
       coalesce(md5(string_agg(r.srrelid::text, ',' order by r.srrelid)), '') as digest,
       coalesce(bool_and(s.subenabled), false) as enabled
  from pg_subscription s join pg_subscription_rel r on r.srsubid = s.oid
 where s.subname = $1 and s.subdbid = (select oid from pg_database where datname = current_database())
