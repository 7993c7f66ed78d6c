-- Names of custom settings (with a dot) that functions, policies, views, defaults and constraints ask for, and that roles
-- and databases set: pg_settings does not show them. 2077, 3294: current_setting; 2078: set_config. Servers 13 and later.
with texts (text) as (
    select prosrc from pg_proc where prosrc ~* 'current_setting|set_config|\mset\M'
    union all
    select pg_get_functiondef(oid) from pg_proc
     where prokind in ('f', 'p') and prosrc = '' and pronamespace <> 'pg_catalog'::regnamespace
    union all
    select pg_get_expr(polqual, polrelid) from pg_policy where polqual is not null
    union all
    select pg_get_expr(polwithcheck, polrelid) from pg_policy where polwithcheck is not null
    union all
    select pg_get_viewdef(ev_class) from pg_rewrite
     where rulename = '_RETURN' and ev_action::text ~ 'funcid (2077|3294|2078)\M' and ev_class >= 16384
    union all
    select pg_get_expr(adbin, adrelid) from pg_attrdef
    union all
    select pg_get_expr(conbin, conrelid) from pg_constraint where conbin is not null and conrelid <> 0
)
select distinct lower(found[2]) from texts,
       regexp_matches(text, '(current_setting|set_config)\s*\(\s*''([A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)+)''', 'gi') found
union
select distinct lower(found[2]) from texts,
       regexp_matches(text, '\mset\s+(session\s+|local\s+)?([a-z_][a-z0-9_$]*(?:\.[a-z_][a-z0-9_$]*)+)\s*(?:=|to\M)', 'gi') found
union
select lower(split_part(setting, '=', 1)) from pg_db_role_setting, unnest(setconfig) setting
 where split_part(setting, '=', 1) like '%.%'
