-- A row if a role may log in with a password now, whatever is said to check that with: everybody may ask. Servers 13 and later.
select 1 from pg_catalog.pg_roles
where rolname = $1::text and rolcanlogin and coalesce(rolvaliduntil, 'infinity') > pg_catalog.now()
