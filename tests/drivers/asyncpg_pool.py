"""asyncpg: a pool with its statement cache, transactions, COPY, session settings of its own.

argv: connection string, number of tasks. Works until standard input ends, then prints one JSON object.
"""
import asyncio
import json
import sys

import asyncpg

url, tasks = sys.argv[1], int(sys.argv[2])
acknowledged, errors, changed = [], [], []


async def work(pool: asyncpg.Pool, number: int, stop: asyncio.Event) -> None:
    i = 0
    while not stop.is_set():
        i += 1
        try:
            async with pool.acquire() as c:
                a, b, d = (f"asyncpg-{number}-{i}-{k}" for k in range(3))
                async with c.transaction():
                    await c.execute("insert into driver_ledger (id) values ($1)", a)
                    await c.execute("update driver_counter set n = n + 1 where id = $1", number)
                acknowledged.append(a)
                await c.executemany("insert into driver_ledger (id) values ($1)", [(b,)])
                acknowledged.append(b)
                await c.copy_records_to_table("driver_ledger", records=[(d,)], columns=["id"])
                acknowledged.append(d)
                if await c.fetchval("select current_setting('app.pool')") != "kept":
                    changed.append("app.pool")
        except Exception as e:
            errors.append(f"{type(e).__name__}: {e}")
            return


async def main() -> None:
    async def prepare(c: asyncpg.Connection) -> None:
        await c.execute("set app.pool = 'kept'")

    async def keep(c: asyncpg.Connection) -> None:
        """No RESET ALL when a connection goes back: what was SET has to survive flips, not the pool."""

    stop = asyncio.Event()
    pool = await asyncpg.create_pool(url, min_size=tasks, max_size=tasks, init=prepare, reset=keep)
    workers = [asyncio.create_task(work(pool, n, stop)) for n in range(tasks)]
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    stop.set()
    await asyncio.gather(*workers)
    await pool.close()
    print(json.dumps({"acknowledged": acknowledged, "errors": errors, "changed": changed}))


asyncio.run(main())
