-- What a role's password is checked with; nothing if it has none, or one that has expired. Servers 13 and later.
select rolpassword from pg_catalog.pg_authid
where rolname = $1::text and coalesce(rolvaliduntil, 'infinity') > pg_catalog.now()
