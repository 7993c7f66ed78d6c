-- Who is a member of what, grants of the same membership by several grantors taken together. to_jsonb: the options are
-- there from 16 on only. Servers 13 and later.
select r.rolname::text as role, m.rolname::text as member, bool_or(a.admin_option) as admin,
       bool_or((to_jsonb(a) ->> 'inherit_option')::boolean) as inherit,
       bool_or((to_jsonb(a) ->> 'set_option')::boolean) as set
from pg_auth_members a
join pg_roles r on r.oid = a.roleid
join pg_roles m on m.oid = a.member
where m.rolname !~ '^pg_'
group by 1, 2
order by 1, 2
