"""asyncpg: a pool, its statement cache, transactions, cursors, COPY, its own reading of types (enums, composites,
arrays) and a codec for hstore, listeners, timeouts."""
import asyncio

import asyncpg

from load import PATIENCE, Load

load = Load("asyncpg", asyncpg.__version__)
READ = "select mood, moods, place, places, tags from driver_sample where id = $1"
WRITE = "insert into driver_ledger (id, mood, moods, place, places, tags) values ($1, $2, $3, $4, $5, $6)"
PARAMETERS = ("so so", ["sad", None, "so so"], (1, 'a, "b"'), [(2, "c"), (None, "")], {"k": "v w", "n": None})


def plain(value):
    """A composite with the names of its fields, which a tuple has not."""
    if isinstance(value, asyncpg.Record):
        return {"record": dict(value)}
    return [plain(one) for one in value] if isinstance(value, list) else value


# Its columns are others on 15 and on 17: what is kept of it is of no use after a flip, until it is prepared anew.
OTHER_COLUMNS = "select current_setting('server_version_num')::int as version, m.* from pg_auth_members m limit 1"
VALUES = ["so so", ["sad", None, "so so"], {"record": {"x": 1, "name": 'a, "b"'}},
          [{"record": {"x": 2, "name": "c"}}, {"record": {"x": None, "name": ""}}], {"k": "v w", "n": None}]


async def give_up(c: asyncpg.Connection, id: str) -> None:
    try:
        await c.execute("insert into driver_ledger (id) values ($1)", id, timeout=PATIENCE)
    except asyncio.TimeoutError:
        return
    load.wrong.append("a statement that was given up while held went through")


async def work(pool: asyncpg.Pool, number: int) -> None:
    try:
        async for id in load.rounds_async(number):
            async with pool.acquire() as c:
                if id.held:
                    await give_up(c, id(0))
                    continue
                if number == 0:
                    await c.execute("select pg_notify($1, $2)", load.name, id(0))
                    load.notified.append(id(0))
                async with c.transaction():
                    await c.execute("insert into driver_ledger (id) values ($1)", id(0))
                    await c.execute("insert into driver_counter values ($1, 1) on conflict (id) do update "
                                    "set n = driver_counter.n + 1", f"{load.name}/{number}")
                    few = [row[0] async for row in c.cursor("select generate_series(1, 10)", prefetch=3)]
                    load.expect("cursor", few, list(range(1, 11)))
                load.acknowledge(id(0))
                await c.executemany("insert into driver_ledger (id) values ($1)", [(id(1),), (id(2),)])
                load.acknowledge(id(1), id(2))
                await c.copy_records_to_table("driver_ledger", records=[(id(3),)], columns=["id"])
                load.acknowledge(id(3))
                await c.execute(WRITE, id(4), *PARAMETERS)
                load.acknowledge(id(4))
                load.expect("values", [plain(value) for value in await c.fetchrow(READ, 1)], VALUES)
                version, *others = await c.fetchrow(OTHER_COLUMNS)
                load.expect("columns of a statement that is kept", len(others), 4 if version < 160_000 else 7)
                kept = await c.fetchrow("select current_setting('app.pool'), current_setting('timezone')")
                load.expect("settings", tuple(kept), ("kept", "Asia/Tokyo"))
    except BaseException as error:
        load.failed(error)


async def main() -> None:
    async def prepare(c: asyncpg.Connection) -> None:
        await c.set_builtin_type_codec("hstore", schema="public", codec_name="pg_contrib.hstore")
        await c.execute("set app.pool = 'kept'")

    async def keep(c: asyncpg.Connection) -> None:
        """No RESET ALL when a connection goes back: what was SET has to survive flips, not the pool."""

    load.start()
    listener = await asyncpg.connect(load.url)
    await listener.add_listener(load.name, lambda *notification: load.heard.append(notification[-1]))
    await listener.execute(load.listen)
    settings = {"application_name": load.name, "timezone": "Asia/Tokyo"}
    async with asyncpg.create_pool(load.url, min_size=load.busy + 1, max_size=load.busy + 1, init=prepare, reset=keep,
                                   max_inactive_connection_lifetime=0, server_settings=settings) as pool:
        *busy, idle = [asyncio.create_task(work(pool, number)) for number in range(load.busy + 1)]
        await asyncio.gather(*busy)
        load.alone.set()
        await idle
    await listener.execute("select 1")
    load.tell()


asyncio.run(main())
