select string_agg(line, E'\n' order by line) from (
    select concat_ws(' ', rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls,
                     rolconnlimit, rolvaliduntil, md5(rolpassword), shobj_description(oid, 'pg_authid')) as line
    from pg_authid where rolname !~ '^pg_'
    union all
    select concat_ws(' ', r.rolname, m.rolname, a.admin_option) from pg_auth_members a
    join pg_roles r on r.oid = a.roleid join pg_roles m on m.oid = a.member where m.rolname !~ '^pg_'
    union all
    select concat_ws(' ', d.datname, r.rolname, s.setconfig) from pg_db_role_setting s
    left join pg_database d on d.oid = s.setdatabase left join pg_roles r on r.oid = s.setrole
    union all
    select concat_ws(' ', datname, pg_get_userbyid(datdba), array(select unnest(datacl)::text order by 1), datconnlimit, shobj_description(oid, 'pg_database'))
    from pg_database where datname in ('app', 'Second "db"')
) lines
