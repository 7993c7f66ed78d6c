"""psqlODBC, by pyodbc: statements prepared by the server, results by cursor (UseDeclareFetch), SQLCancel. What it does
not know it hands over as text."""
import sys
from contextlib import closing
from urllib.parse import urlsplit

import pyodbc

from load import Load, impatient

at = urlsplit(sys.argv[-2])
pyodbc.pooling = False
CONNECT = (f"DRIVER={sys.argv[1]};SERVER={at.hostname};PORT={at.port};DATABASE={at.path[1:]};UID={at.username};"
           f"PWD={at.password};UseServerSidePrepare=1;UseDeclareFetch=1;Fetch=3;ApplicationName=psqlodbc")
load = Load("psqlodbc", f"?, pyodbc {pyodbc.version}")
VALUES = ("so so", '{sad,NULL,"so so"}', '(1,"a, ""b""")', '{"(2,c)","(,\\"\\")"}', '"k"=>"v w", "n"=>NULL')
WRITE = ("insert into driver_ledger (id, mood, moods, place, places, tags) values (?, cast(? as driver_mood), "
         "cast(? as driver_mood[]), cast(? as driver_place), cast(? as driver_place[]), cast(? as hstore))")


def give_up(c: pyodbc.Connection, id: str) -> None:
    with closing(c.cursor()) as cursor:
        try:
            with impatient(cursor.cancel):
                cursor.execute("insert into driver_ledger (id) values (?)", id)
        except pyodbc.Error as error:
            load.expect("SQLSTATE of SQLCancel", error.args[0], "57014")
        else:
            load.wrong.append("a statement that was canceled while held went through")


def work(number: int) -> None:
    c = pyodbc.connect(CONNECT, autocommit=True)
    load.version = f"{c.getinfo(pyodbc.SQL_DRIVER_VER)}, pyodbc {pyodbc.version}"
    with closing(c.cursor()) as cursor:
        cursor.execute("set app.tenant = 'kept'")
        cursor.execute("set timezone = 'Asia/Tokyo'")
    insert = c.cursor()
    for id in load.rounds(number):
        if id.held:
            give_up(c, id(0))
            continue
        insert.execute("insert into driver_ledger (id) values (?)", id(0))
        load.acknowledge(id(0))
        c.autocommit = False
        insert.execute("insert into driver_ledger (id) values (?)", id(1))
        with closing(c.cursor()) as cursor:
            cursor.execute(WRITE, id(2), *VALUES)
            few = cursor.execute("select generate_series(1, 10)").fetchall()
        c.commit()
        c.autocommit = True
        load.acknowledge(id(1), id(2))
        load.expect("cursor", [row[0] for row in few], list(range(1, 11)))
        # With UseDeclareFetch a transaction stays open until the statement is closed, with autocommit as well; and what
        # pyodbc does at the end of "with" is no close().
        with closing(c.cursor()) as cursor:
            read = cursor.execute("select mood, moods, place, places, tags, id from driver_sample where id = ?", 1)
            load.expect("types", [column[1] for column in read.description], [str] * 5 + [int])
            load.expect("values", tuple(read.fetchone()), (*VALUES, 1))
        with closing(c.cursor()) as cursor:
            kept = cursor.execute("select current_setting('app.tenant'), current_setting('timezone')").fetchone()
            load.expect("settings", tuple(kept), ("kept", "Asia/Tokyo"))
    c.close()


load.run(work)
