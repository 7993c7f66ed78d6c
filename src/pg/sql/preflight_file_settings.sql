-- Of the settings that clients feel, those that pgflip's own sessions set for themselves, as the configuration files
-- have them. Needs to be allowed to read pg_file_settings. Servers 13 and later.
select lower(f.name) as name, f.setting
from pg_file_settings f
where f.applied
  and lower(f.name) in ('datestyle', 'timezone', 'search_path', 'client_encoding', 'default_transaction_isolation',
                        'default_transaction_read_only', 'default_transaction_deferrable', 'lock_timeout',
                        'statement_timeout', 'idle_in_transaction_session_timeout', 'extra_float_digits',
                        'standard_conforming_strings', 'synchronous_commit')
order by 1
