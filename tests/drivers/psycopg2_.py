"""psycopg2: registered composite, hstore and enum array, a named cursor, COPY, PREPARE and EXECUTE, a temporary table,
notifications, cancel()."""
import io

import psycopg2
import psycopg2.extensions
import psycopg2.extras

from load import Load, impatient

load = Load("psycopg2", f"{psycopg2.__version__}, libpq {psycopg2.extensions.libpq_version()}")


def give_up(c, id: str) -> None:
    try:
        with impatient(c.cancel), c.cursor() as cursor:
            cursor.execute("insert into driver_ledger (id) values (%s)", (id,))
    except psycopg2.errors.QueryCanceled:
        return
    load.wrong.append("a statement that was canceled while held went through")


def work(number: int) -> None:
    c = psycopg2.connect(load.url, application_name=load.name, options="-c app.tenant=tenant%s" % number)
    c.autocommit = True
    psycopg2.extras.register_hstore(c)
    Place = psycopg2.extras.register_composite("driver_place", c).type
    values = ("so so", ["sad", None, "so so"], Place(1, 'a, "b"'), [Place(2, "c"), Place(None, "")],
              {"k": "v w", "n": None})
    with c.cursor() as cursor:
        cursor.execute("select typarray from pg_type where typname = 'driver_mood'")
        moods = psycopg2.extensions.new_array_type(cursor.fetchone(), "driver_mood[]", psycopg2.extensions.UNICODE)
        psycopg2.extensions.register_type(moods, c)
        cursor.execute("set timezone = 'Asia/Tokyo'")
        cursor.execute("create temp table driver_temporary as select %s as number", (number,))
        cursor.execute("prepare driver_insert (text, driver_mood) as insert into driver_ledger (id) "
                       "select $1 where $2 = 'ok'")
        cursor.execute("prepare driver_read as select mood, moods, place, places, tags from driver_sample where id = $1")
    for id in load.rounds(number):
        if id.held:
            give_up(c, id(0))
            continue
        c.autocommit = False
        with c, c.cursor() as cursor:
            cursor.execute("insert into driver_ledger (id) values (%s)", (id(0),))
            cursor.execute("insert into driver_counter values (%s, 1) on conflict (id) do update "
                           "set n = driver_counter.n + 1", (f"{load.name}/{number}",))
        load.acknowledge(id(0))
        with c, c.cursor("few") as few:
            few.itersize = 3
            few.execute("select generate_series(1, 10)")
            load.expect("server-side cursor", [row[0] for row in few], list(range(1, 11)))
        c.autocommit = True
        with c.cursor() as cursor:
            if number == 0:
                cursor.execute("select pg_notify(%s, %s)", (load.name, id(0)))
                load.notified.append(id(0))
            cursor.execute("execute driver_insert (%s, 'ok')", (id(1),))
            load.acknowledge(id(1))
            cursor.execute(
                "insert into driver_ledger (id, mood, moods, place, places, tags) "
                "values (%s, %s, %s::driver_mood[], %s::driver_place, %s::driver_place[], %s)", (id(2), *values))
            load.acknowledge(id(2))
            cursor.copy_expert("copy driver_ledger (id) from stdin", io.StringIO(f"{id(5)}\n"))
            load.acknowledge(id(5))
            psycopg2.extras.execute_values(cursor, "insert into driver_ledger (id) values %s", [(id(3),), (id(4),)])
            load.acknowledge(id(3), id(4))
            cursor.execute("execute driver_read (1)")
            load.expect("values", cursor.fetchone(), values)
            cursor.execute("select number from driver_temporary")
            load.expect("temporary table", cursor.fetchall(), [(number,)])
            cursor.execute("select current_setting('app.tenant'), current_setting('timezone')")
            load.expect("settings", cursor.fetchone(), (f"tenant{number}", "Asia/Tokyo"))
    c.close()


def hear() -> None:
    with listener.cursor() as cursor:
        cursor.execute("select 1")
    load.heard.extend(notify.payload for notify in listener.notifies)


listener = psycopg2.connect(load.url)
listener.autocommit = True
with listener.cursor() as cursor:
    cursor.execute(load.listen)
load.run(work, last=hear)
