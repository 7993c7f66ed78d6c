-- A database ($1) as it has to be made again elsewhere. to_jsonb: the locale's columns changed with 15, 16 and 17.
-- Servers 13 and later.
select pg_encoding_to_char(d.encoding)::text as encoding, d.datcollate::text as collate, d.datctype::text as ctype,
       coalesce(to_jsonb(d) ->> 'datlocprovider', 'c') as provider,
       coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') as locale,
       to_jsonb(d) ->> 'daticurules' as rules,
       pg_get_userbyid(d.datdba)::text as owner, d.datconnlimit as connection_limit,
       shobj_description(d.oid, 'pg_database') as comment
from pg_database d
where d.datname = $1
