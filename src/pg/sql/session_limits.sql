-- A session's time limits, and from then on none until the end of the transaction: reading its state must not run into
-- them. Operators and functions are qualified because the session's search_path may be anything. Servers 13 and later.
select 'limits',
       pg_catalog.current_setting('statement_timeout'),
       pg_catalog.current_setting('lock_timeout'),
       pg_catalog.current_setting('idle_in_transaction_session_timeout'),
       pg_catalog.current_setting('transaction_timeout', true),
       pg_catalog.set_config('statement_timeout', '0', true),
       pg_catalog.set_config('lock_timeout', '0', true),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
       case when pg_catalog.current_setting('transaction_timeout', true) is not null
            then pg_catalog.set_config('transaction_timeout', '0', true) end,
       -- Milliseconds. Not from pg_settings: that shows all settings to find one, at the cost of everything else here.
       (extract(epoch from pg_catalog.current_setting('idle_session_timeout', true)::pg_catalog.interval)
        OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8::pg_catalog.text
