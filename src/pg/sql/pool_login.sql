-- What a server looks at before it lets a user ($1) into a database ($2), beside the password: one row; null of what does not
-- exist. Servers 13 and later.
select r.rolcanlogin,
       d.datallowconn,
       pg_catalog.has_database_privilege(r.oid, d.oid, 'CONNECT')
  from (select) one
  left join pg_catalog.pg_roles r on r.rolname = $1::text
  left join pg_catalog.pg_database d on d.datname = $2::text
