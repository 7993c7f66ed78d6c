//! What asks for temporary relations: the same conditions from inside their session and from outside, with other sizes.

/// How their sizes are read. Not one statement for all: rights to functions are checked whether they are called or not.
#[derive(Clone, Copy, Debug)]
pub enum Sizes {
    /// In the session itself, whose tables nobody else locks.
    Own,
    /// Of files: from outside, for who may read these. No lock is waited for.
    Files,
    /// Not at all.
    Unknown,
}

/// `temporary`, a common table expression, and behind it `rest`. $1: OIDs of the schemas.
pub fn query(sizes: Sizes, rest: &str) -> String {
    let sizes = match sizes {
        Sizes::Own => {
            "select case when c.relkind in ('r', 'S') then pg_table_size(c.oid) else 0 end as bytes,
             case when c.relkind = 'r' then pg_relation_size(c.oid) end as rows"
        }
        Sizes::Files => {
            "select size as bytes, size as rows from (select case when c.relkind in ('r', 'S')
             then (pg_stat_file(pg_relation_filepath(c.oid), true)).size else 0 end as size) file"
        }
        Sizes::Unknown => "select null::int8 as bytes, null::int8 as rows",
    };
    let relations = include_str!("sql/temporary_relations.sql").replace("{sizes}", sizes);
    format!("with temporary as materialized ({relations})\n{rest}")
}
