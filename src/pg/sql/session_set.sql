-- Sets $1 to $2 for the session; with $3 only if it is something else now. A limit that is off ('0') needs no setting on a
-- server that does not know it: 17 brought transaction_timeout, and a session has to be able to go back to 16. Servers 13 and
-- later.
select case when $3 and pg_catalog.current_setting($1, true) OPERATOR(pg_catalog.=) $2 then null
            when $2 OPERATOR(pg_catalog.=) '0'
             and pg_catalog.strpos($1, '.') OPERATOR(pg_catalog.=) 0
             and pg_catalog.current_setting($1, true) is null
            then null
            else pg_catalog.set_config($1, $2, false) end
