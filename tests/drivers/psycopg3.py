"""psycopg 3: transactions, automatic prepared statements, a pipeline, a server-side cursor, session settings.

argv: connection string, number of threads. Works until standard input ends, then prints one JSON object:
acknowledged ids, errors, and how often a session was found changed.
"""
import json
import sys
import threading

import psycopg

url, threads = sys.argv[1], int(sys.argv[2])
stop = threading.Event()
acknowledged, errors, changed = [], [], []


def work(number: int) -> None:
    try:
        with psycopg.connect(url, application_name=f"psycopg-{number}", prepare_threshold=2) as c:
            c.autocommit = True
            c.execute("set app.tenant = 'tenant %s'" % number)
            c.execute("set timezone = 'Asia/Tokyo'")
            i = 0
            while not stop.is_set():
                i += 1
                ids = [f"psycopg-{number}-{i}-{k}" for k in range(4)]
                with c.transaction():
                    c.execute("insert into driver_ledger (id) values (%s)", (ids[0],))
                    c.execute("update driver_counter set n = n + 1 where id = %s", (number,))
                acknowledged.append(ids[0])
                with c.pipeline():
                    for one in ids[1:3]:
                        c.execute("insert into driver_ledger (id) values (%s)", (one,))
                acknowledged.extend(ids[1:3])
                with c.transaction():
                    with c.cursor(name="few") as few:
                        few.itersize = 3
                        few.execute("select generate_series(1, 10)")
                        if [row[0] for row in few] != list(range(1, 11)):
                            changed.append("server-side cursor")
                with c.cursor() as cur, cur.copy("copy driver_ledger (id) from stdin") as copy:
                    copy.write_row((ids[3],))
                acknowledged.append(ids[3])
                tenant, zone = c.execute(
                    "select current_setting('app.tenant'), current_setting('timezone')").fetchone()
                if (tenant, zone) != (f"tenant {number}", "Asia/Tokyo"):
                    changed.append(f"{tenant}, {zone}")
    except Exception as e:  # every error is one that the application would have seen
        errors.append(f"{type(e).__name__}: {e}")


workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
for w in workers:
    w.start()
print("ready", flush=True)
sys.stdin.read()
stop.set()
for w in workers:
    w.join()
print(json.dumps({"acknowledged": acknowledged, "errors": errors, "changed": changed}))
