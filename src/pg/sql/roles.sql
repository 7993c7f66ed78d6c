-- Every role but the predefined ones, with its verifier. Needs SELECT on pg_authid. VALID UNTIL 'infinity' is as good as
-- none. Servers 13 and later.
select r.rolname::text as name, r.oid = 10 as bootstrap, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb,
       r.rolcanlogin, r.rolreplication, r.rolbypassrls, r.rolconnlimit, r.rolpassword,
       nullif(r.rolvaliduntil, 'infinity')::text as valid_until, shobj_description(r.oid, 'pg_authid') as comment
from pg_authid r
where r.rolname !~ '^pg_'
order by r.rolname
