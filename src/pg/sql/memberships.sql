-- Who is a member of what, one grant a row: from 16 on the same membership may have been granted by several. to_jsonb:
-- the options are there from 16 on only. Servers 13 and later.
select r.rolname::text as role, m.rolname::text as member, coalesce(g.rolname::text, '') as grantor,
       a.admin_option as admin,
       (to_jsonb(a) ->> 'inherit_option')::boolean as inherit,
       (to_jsonb(a) ->> 'set_option')::boolean as set
from pg_auth_members a
join pg_roles r on r.oid = a.roleid
join pg_roles m on m.oid = a.member
left join pg_roles g on g.oid = a.grantor
where m.rolname !~ '^pg_'
order by 1, 2, 3
