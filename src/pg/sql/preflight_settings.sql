-- Server settings that clients feel. Those that pgflip's own sessions set for themselves are read from the configuration
-- files. Servers 13 and later.
with felt (name) as (values
    ('bytea_output'), ('default_text_search_config'), ('default_toast_compression'), ('IntervalStyle'), ('lc_messages'),
    ('lc_monetary'), ('lc_numeric'), ('lc_time'), ('password_encryption'), ('row_security'), ('xmlbinary'), ('xmloption'),
    ('backslash_quote'), ('escape_string_warning'), ('transform_null_equals'), ('array_nulls'), ('max_connections'),
    ('max_prepared_transactions'), ('timezone_abbreviations'), ('idle_session_timeout'), ('transaction_timeout'),
    ('shared_preload_libraries'), ('session_preload_libraries'), ('check_function_bodies'))
select lower(s.name) as name, s.setting
from pg_settings s join felt f on lower(f.name) = lower(s.name)
order by 1
