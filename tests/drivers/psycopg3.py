"""psycopg 3: prepared statements, pipelines, server-side cursors, one of them WITH HOLD, COPY, text and binary results,
registered types, notify handlers, cancel_safe()."""
import enum
from itertools import count
from typing import NamedTuple

import psycopg
from psycopg.types import TypeInfo
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.hstore import register_hstore

from load import Load, impatient

load = Load("psycopg3", f"{psycopg.__version__}, libpq {psycopg.pq.version()}")


class Mood(enum.Enum):
    sad, ok, so_so = "sad", "ok", "so so"


class Place(NamedTuple):
    x: int | None
    name: str | None


VALUES = (Mood.so_so, [Mood.sad, None, Mood.so_so], Place(1, 'a, "b"'), [Place(2, "c"), Place(None, "")],
          {"k": "v w", "n": None})
READ = "select mood, moods, place, places, tags from driver_sample where id = %s"
WRITE = "insert into driver_ledger (id, mood, moods, place, places, tags) values (%s, %s, %s, %s, %s, %s)"
INSERT = "insert into driver_ledger (id) values (%s)"


def give_up(c: psycopg.Connection, id: str) -> None:
    try:
        with impatient(c.cancel_safe):
            c.execute(INSERT, (id,))
    except psycopg.errors.QueryCanceled:
        return
    load.wrong.append("a statement that was canceled while held went through")


def work(number: int) -> None:
    with psycopg.connect(load.url, application_name=load.name, prepare_threshold=2, autocommit=True) as c:
        register_enum(EnumInfo.fetch(c, "driver_mood"), c, Mood, mapping={mood: mood.value for mood in Mood})
        register_composite(CompositeInfo.fetch(c, "driver_place"), c, factory=Place)
        register_hstore(TypeInfo.fetch(c, "hstore"), c)
        c.execute("set app.tenant = 'tenant %s'" % number)
        c.execute("set timezone = 'Asia/Tokyo'")
        kept = c.cursor(name="kept", withhold=True, scrollable=True)
        kept.execute("select generate_series(1, 1000)")
        fetched = count(1)
        for id in load.rounds(number):
            if id.held:
                give_up(c, id(0))
                continue
            load.expect("cursor WITH HOLD", kept.fetchone(), (next(fetched),))
            if number == 0:
                c.execute("select pg_notify(%s, %s)", (load.name, id(0)))
                load.notified.append(id(0))
            with c.transaction():
                c.execute(INSERT, (id(0),))
                c.execute("insert into driver_counter values (%s, 1) on conflict (id) do update "
                          "set n = driver_counter.n + 1", (f"{load.name}/{number}",))
            load.acknowledge(id(0))
            with c.pipeline():
                c.execute(INSERT, (id(1),))
                c.execute(WRITE, (id(2), *VALUES), prepare=True)
            load.acknowledge(id(1), id(2))
            with c.transaction(), c.cursor(name="few") as few:
                few.itersize = 3
                few.execute("select generate_series(1, 10)")
                load.expect("server-side cursor", [row[0] for row in few], list(range(1, 11)))
            with c.cursor() as cursor, cursor.copy("copy driver_ledger (id) from stdin") as copy:
                copy.write_row((id(3),))
            load.acknowledge(id(3))
            for binary in (False, True):
                with c.cursor(binary=binary) as cursor:
                    load.expect(f"values, binary={binary}", cursor.execute(READ, (1,), prepare=True).fetchone(), VALUES)
            load.expect("settings", c.execute(
                "select current_setting('app.tenant'), current_setting('timezone')").fetchone(),
                (f"tenant {number}", "Asia/Tokyo"))


with psycopg.connect(load.url, autocommit=True) as listener:
    listener.add_notify_handler(lambda notify: load.heard.append(notify.payload))
    listener.execute(load.listen)
    load.run(work, last=lambda: listener.execute("select 1"))
