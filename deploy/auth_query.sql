-- For `auth.verifiers = "query"`: lets pgflip's role read what clients' passwords are checked with, without the right to read
-- pg_authid. To be run by a superuser, on blue, in the first of `databases`, before `pgflip replication start` copies it to green
-- with all the rest; later, on both servers:
--
--   psql -v role=pgflip -f auth_query.sql app
--
-- Of superusers it gives nothing, nor of roles that may not log in, or no longer (VALID UNTIL). What it gives is as good as a
-- password if it is an md5 hash, so nobody but that role may call it.
begin;
create schema if not exists pgflip_auth;
revoke all on schema pgflip_auth from public;

-- Names are looked up in pg_catalog alone, and in temporary objects last, which is never: whoever calls this can't put an object
-- of its own in the place of one that it uses.
create or replace function pgflip_auth.verifier(role text, out name text, out verifier text)
  returns setof record
  language sql stable strict security definer
  set search_path = pg_catalog, pg_temp
as $$
  select rolname, rolpassword from pg_catalog.pg_authid
  where rolname = $1 and rolcanlogin and not rolsuper
    and coalesce(rolvaliduntil, 'infinity') > pg_catalog.now()
$$;
revoke all on function pgflip_auth.verifier(text) from public;

grant usage on schema pgflip_auth to :"role";
grant execute on function pgflip_auth.verifier(text) to :"role";
commit;
