-- About how many locks making this database's schema again takes in one transaction. Servers 13 and later.
select count(*) as relations
from pg_class c
where c.oid >= 16384 and c.relkind in ('r', 'p', 'i', 'I', 'S', 't', 'v', 'm', 'f', 'c')
