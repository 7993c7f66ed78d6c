-- Every table in publication pgflip (its marker left out): what its rows depend on beside what is written to them. Another file: it
-- was emptied, or written anew as by ALTER TABLE or VACUUM FULL. Of the rest: the publication's entry (another one if it was taken
-- out and put back), the key, the columns, and what their types consist of. Servers 13 and later.
select n.nspname as schema, c.relname as name, c.oid, c.relfilenode as file,
       pg_catalog.md5(pg_catalog.concat(
         c.relreplident, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate, pg_catalog.to_jsonb(r)::pg_catalog.text,
         (select pg_catalog.string_agg(pg_catalog.concat_ws(' ', i.indkey, i.indclass, i.indisprimary, i.indisreplident,
                                                            i.indisunique, i.indisvalid), ','
                                       order by i.indisprimary, i.indkey::pg_catalog.text)
          from pg_catalog.pg_index i where i.indrelid = c.oid and (i.indisprimary or i.indisreplident)),
         (select pg_catalog.string_agg(pg_catalog.concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attgenerated,
                                                            a.attcollation, pg_catalog.pg_get_expr(d.adbin, d.adrelid), e.labels,
                                                            f.fields), ','
                                       order by a.attnum)
          from pg_catalog.pg_attribute a
          join pg_catalog.pg_type t on t.oid = a.atttypid
          left join pg_catalog.pg_type b on b.oid = case when t.typtype = 'd' then t.typbasetype else nullif(t.typelem, 0) end
          left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum and a.attgenerated <> ''
          cross join lateral (
            select pg_catalog.string_agg(e.enumlabel, ',' order by e.enumsortorder) as labels
            from pg_catalog.pg_enum e where e.enumtypid in (t.oid, b.oid)) e
          cross join lateral (
            select pg_catalog.string_agg(pg_catalog.concat_ws(' ', f.attname, f.atttypid, f.atttypmod), ',' order by f.attnum) as fields
            from pg_catalog.pg_attribute f
            where f.attrelid in (nullif(t.typrelid, 0), nullif(b.typrelid, 0)) and f.attnum > 0 and not f.attisdropped) f
          where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))) as columns
from pg_catalog.pg_publication p
join pg_catalog.pg_publication_rel r on r.prpubid = p.oid
join pg_catalog.pg_class c on c.oid = r.prrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where p.pubname = 'pgflip' and n.nspname <> 'pgflip'
