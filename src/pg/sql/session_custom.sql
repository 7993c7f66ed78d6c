-- Behind session_state.sql: the custom settings among $1, names separated by chr(1), that the session has.
union all
select distinct 'setting', n.name, pg_catalog.current_setting(n.name, true), null, null
  from pg_catalog.unnest(pg_catalog.string_to_array($1, pg_catalog.chr(1))) n (name)
 where pg_catalog.current_setting(n.name, true) is not null
   and n.name OPERATOR(pg_catalog.<>) all (array(select s.name from pg_catalog.pg_show_all_settings() s))
