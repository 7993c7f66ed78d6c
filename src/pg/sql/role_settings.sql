-- Settings of ALTER ROLE and ALTER DATABASE for these databases ($1) and for all; an empty name stands for "all".
-- Servers 13 and later.
select coalesce(d.datname::text, '') as database, coalesce(r.rolname::text, '') as role, s.setconfig as settings
from pg_db_role_setting s
left join pg_database d on d.oid = s.setdatabase
left join pg_roles r on r.oid = s.setrole
where (s.setdatabase = 0 or d.datname = any ($1))
  and (s.setrole = 0 or (r.rolname is not null and r.rolname !~ '^pg_'))
order by 1, 2
