-- One digest of everything that is mirrored of a server: roles with their verifiers, memberships, settings, and who may do
-- what with the databases ($1). To be compared with an earlier one of the same server only. Servers 13 and later.
select md5(coalesce(string_agg(line, E'\n' order by line collate "C"), ''))
from (
    select to_jsonb(a)::text || coalesce(shobj_description(a.oid, 'pg_authid'), '') as line
    from pg_authid a where a.rolname !~ '^pg_'
    union all
    select to_jsonb(m)::text from pg_auth_members m
    union all
    select to_jsonb(s)::text from pg_db_role_setting s
    union all
    select concat_ws(' ', d.datname, d.datdba, d.datconnlimit, d.datacl::text, shobj_description(d.oid, 'pg_database'))
    from pg_database d where d.datname = any ($1)
) as everything
