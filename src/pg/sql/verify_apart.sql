-- What a database has beside its tables' rows, counted. Servers 13 and later.
select (select count(*) from pg_catalog.pg_largeobject_metadata) as large_objects,
       (select count(*) from pg_catalog.pg_class c where c.relkind = 'r' and c.relpersistence = 'u') as unlogged_tables
