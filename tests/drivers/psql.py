"""psql, driven through its standard input: PREPARE and \\bind_named, \\copy, results by cursor (FETCH_COUNT), a
transaction, a pipeline, settings, Ctrl-C, notifications. Whatever it says beside what is expected is wrong: a reconnect,
say, or a warning."""
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable

from load import Load, impatient

program = sys.argv[1]
load = Load("psql", subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split()[-1])
VALUES = 'so so|{sad,NULL,"so so"}|(1,"a, ""b""")|{"(2,c)","(,\\"\\")"}|"k"=>"v w", "n"=>NULL'


def session() -> tuple[subprocess.Popen, Callable[[str], list[str]]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    psql = subprocess.Popen([program, "-XqAt", "-v", "ON_ERROR_STOP=1", load.url], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
                            env={**environment, "PGAPPNAME": load.name})

    def say(text: str) -> list[str]:
        psql.stdin.write(f"{text}\n\\echo -- done\n")
        psql.stdin.flush()
        said = []
        while (line := psql.stdout.readline().rstrip("\n")) != "-- done":
            said.append(line)
            if psql.poll() is not None:
                raise RuntimeError(f"psql ended: {said}")
        return said

    return psql, say


def give_up(psql: subprocess.Popen, id: str) -> None:
    """Ctrl-C: psql ends, because its input is no terminal."""
    with impatient(lambda: psql.send_signal(signal.SIGINT)):
        said, _ = psql.communicate(f"insert into driver_ledger (id) values ('{id}');\n")
    load.expect("Ctrl-C", said, "Cancel request sent\nERROR:  canceling statement due to user request\n")


def work(number: int) -> None:
    psql, say = session()
    other, _ = session() if number == load.busy else (None, None)
    say("set app.tenant = 'kept'; set timezone = 'Asia/Tokyo';")
    say("prepare driver_insert (text) as insert into driver_ledger (id) values ($1);")
    say("select mood, moods, place, places, tags from driver_sample where id = $1 \\parse driver_read")
    for id in load.rounds(number):
        if id.held:
            give_up(other, id(0))
            continue
        if number == 0:
            load.expect("NOTIFY", say(f"notify psql, '{id(0)}';"), [])
            load.notified.append(id(0))
        load.expect("EXECUTE", say(f"execute driver_insert ('{id(0)}');"), [])
        load.expect("a transaction", say(f"""begin;
            insert into driver_ledger (id) values ('{id(1)}');
            insert into driver_ledger (id, mood, moods, place, places, tags)
                select '{id(2)}', mood, moods, place, places, tags from driver_sample;
            commit;"""), [])
        load.expect("\\copy", say(f"\\copy driver_ledger (id) from pstdin\n{id(3)}\n\\."), [])
        load.expect("a pipeline", say(f"""\\startpipeline
            insert into driver_ledger (id) values ($1) \\bind '{id(4)}' \\sendpipeline
            insert into driver_ledger (id) values ($1) \\bind '{id(5)}' \\sendpipeline
            \\endpipeline"""), [])
        load.acknowledge(*map(id, range(6)))
        load.expect("values", say("\\bind_named driver_read 1 \\g"), [VALUES])
        load.expect("FETCH_COUNT", say("\\set FETCH_COUNT 3\nselect generate_series(1, 10);\n\\unset FETCH_COUNT"),
                    [str(n) for n in range(1, 11)])
        load.expect("settings", say("select current_setting('app.tenant'), current_setting('timezone');"),
                    ["kept|Asia/Tokyo"])
    psql.stdin.close()
    load.expect("exit status", psql.wait(), 0)


def hear() -> None:
    notification = r'Asynchronous notification "psql" with payload "(.*)" received from server process with PID \d+\.'
    for line in say("select 1 where false;"):
        found = re.fullmatch(notification, line)
        load.heard.append(found[1] if found else line)


_, say = session()
say(load.listen + " \\gset")
load.run(work, last=hear)
