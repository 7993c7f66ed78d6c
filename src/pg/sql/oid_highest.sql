-- The highest OID in use in the catalogs of this database and in those that all databases share (but for a few that not
-- everybody may read): the server's OID counter is beyond it, unless it has started again from 16384. It takes no OID,
-- which any other way of reading the counter does. Servers 13 and later.
select greatest(
    (select max(oid) from pg_class), (select max(oid) from pg_type), (select max(oid) from pg_proc),
    (select max(oid) from pg_namespace), (select max(oid) from pg_enum), (select max(oid) from pg_constraint),
    (select max(oid) from pg_extension), (select max(oid) from pg_operator), (select max(oid) from pg_opclass),
    (select max(oid) from pg_opfamily), (select max(oid) from pg_amop), (select max(oid) from pg_amproc),
    (select max(oid) from pg_am), (select max(oid) from pg_cast), (select max(oid) from pg_trigger),
    (select max(oid) from pg_event_trigger), (select max(oid) from pg_rewrite), (select max(oid) from pg_attrdef),
    (select max(oid) from pg_language), (select max(oid) from pg_collation), (select max(oid) from pg_conversion),
    (select max(oid) from pg_policy), (select max(oid) from pg_statistic_ext), (select max(oid) from pg_default_acl),
    (select max(oid) from pg_ts_config), (select max(oid) from pg_ts_dict), (select max(oid) from pg_ts_parser),
    (select max(oid) from pg_ts_template), (select max(oid) from pg_foreign_data_wrapper),
    (select max(oid) from pg_foreign_server), (select max(oid) from pg_transform), (select max(oid) from pg_publication),
    (select max(oid) from pg_publication_rel), (select max(oid) from pg_largeobject_metadata),
    (select max(oid) from pg_database), (select max(oid) from pg_roles), (select max(oid) from pg_tablespace),
    16383::oid) as highest
