-- Who may do what with a database ($1), one right a row; an empty grantee is everybody. Servers 13 and later.
select distinct coalesce(r.rolname::text, '') as grantee, a.privilege_type as privilege, a.is_grantable as grantable
from pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
left join pg_roles r on r.oid = a.grantee
where d.datname = $1 and (a.grantee = 0 or r.rolname is not null)
order by 1, 2
