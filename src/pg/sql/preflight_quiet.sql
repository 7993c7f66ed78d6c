-- Settings that keep verifiers out of the server's log (links::hush) and that pgflip's role may not set here. Servers 15 and
-- later.
select name
from unnest(array['log_statement', 'log_min_duration_statement', 'log_min_duration_sample', 'log_min_error_statement',
                  'log_transaction_sample_rate', 'log_duration']) with ordinality as s (name, n)
where not has_parameter_privilege(name, 'SET')
order by n
