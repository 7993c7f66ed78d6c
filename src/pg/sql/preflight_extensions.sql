-- Which of these extensions ($1) pgflip's role, no superuser, neither has here nor can make: name, and whether somebody else's
-- is here. Those that are not available are told elsewhere. Servers 13 and later.
select n.name, e.oid is not null as here
from unnest($1::text[]) as n (name)
left join pg_extension e on e.extname = n.name
where case
          when e.oid is not null then not pg_has_role(e.extowner, 'USAGE')
          else exists (select from pg_available_extensions a where a.name = n.name)
               and not exists (select from pg_available_extension_versions v where v.name = n.name and v.trusted)
      end
order by 1
