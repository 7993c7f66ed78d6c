-- Of a session that nobody waits for any more the server ends what it is at. From 14 on, and not on all systems.
do $$
begin
    perform pg_catalog.set_config(name, '1s', false) from pg_catalog.pg_settings where name = 'client_connection_check_interval';
exception when others then
    null;
end
$$
