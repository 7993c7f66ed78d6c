-- Columns of table $1 (its quoted name) that no UPDATE may set: GENERATED ALWAYS AS IDENTITY. Servers 13 and later.
select a.attname
from pg_catalog.pg_attribute a
where a.attrelid = ($1::pg_catalog.text)::pg_catalog.regclass and a.attnum > 0 and not a.attisdropped and a.attidentity = 'a'
