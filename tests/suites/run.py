#!/usr/bin/env python3
"""Runs drivers' own test suites against a throwaway Postgres: directly, through pgflip in session mode, and through pgflip
in transaction mode. Then says, test by test, what went otherwise through pgflip.

    tests/suites/run.py asyncpg                      all three ways
    tests/suites/run.py asyncpg psycopg2 --ways direct,transaction
    tests/suites/run.py asyncpg --only test_listeners

Suites come from the registries where their drivers come from, by name and version (see suites.py), into
$PGFLIP_SUITES_CACHE, and so does what they need. What each test said is kept there, in results/; so is pgflip's log.
pgflip is built first, unless PGFLIP_BIN names one. Exit code 1: something passed directly and not through pgflip.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import suites
from suites import CACHE, REPOSITORY, Place, say

WAYS = ("direct", "session", "transaction")
# For whatever should be quick.
LIMIT = 60


def servers_user() -> dict:
    """Postgres refuses to run as root: its programs run as somebody else then."""
    if os.geteuid():
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def environment() -> dict:
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(true, what: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + LIMIT
    while not true():
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"{what} is not ready; the end of its log:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def stop(process: subprocess.Popen, signal: int) -> None:
    process.send_signal(signal)
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        say(f"process {process.pid} did not end within {LIMIT} s of signal {signal}: killed")
        process.kill()
        process.wait()


@contextmanager
def postgres(suite: suites.Suite, way: str, binaries: Path, directory: Path, port: int):
    """A server that trusts this machine (or asks as the suite's rules say), with what the suite wants to find there."""
    data, log = directory / "data", directory / "postgres.log"
    data.mkdir()
    if not os.geteuid():
        directory.chmod(0o711)
        shutil.chown(data, "nobody")
    run = {"env": environment(), "cwd": "/", **servers_user()}
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"],
        check=True,
        stdout=subprocess.DEVNULL,
        **run,
    )
    (data / "pg_hba.conf").write_text(suite.server_rules(way))
    settings = {
        "port": port,
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "fsync": "off",
        "max_connections": 300,
        "wal_level": "logical",
        "max_prepared_transactions": 20,
        **suite.settings,
    }
    command = [binaries / "postgres", "-D", data]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **run)
    try:

        def psql(database: str, sql: str) -> int:
            return subprocess.run(
                [
                    binaries / "psql",
                    "-qXw",
                    "-v",
                    "ON_ERROR_STOP=1",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(port),
                    "-U",
                    "postgres",
                    "-d",
                    database,
                    "-c",
                    sql,
                ],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=None if sql != "select 1" else subprocess.DEVNULL,
            ).returncode

        wait_until(lambda: psql("postgres", "select 1") == 0, "Postgres", process, log)
        for database, sql in suite.sql:
            if psql(database, sql):
                sys.exit(f"{suite.name}: its server can't be made ready")
        yield
    finally:
        stop(process, signal.SIGINT)


@contextmanager
def pgflip(suite: suites.Suite, program: Path, mode: str, directory: Path, server: int, port: int, log: Path):
    """pgflip before that server. There is no green: nothing is to be flipped."""
    admin = free_port()
    (directory / "rules").write_text(suite.rules)
    databases = json.dumps(suite.databases)
    (directory / "config.toml").write_text(f"""
listen = "127.0.0.1:{port}"
databases = {databases}
[blue]
url = "postgresql://postgres:unused@127.0.0.1:{server}"
[green]
url = "postgresql://postgres:unused@127.0.0.1:{free_port()}"
[admin]
listen = "127.0.0.1:{admin}"
[auth]
rules = "rules"
[limits]
temporary_max = 1_048_576
[pool]
pool_mode = "{mode}"
[log]
level = "info"
""")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "run", "--config", directory / "config.toml"], env=environment(), stdout=output, stderr=output
        )

    def ready() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(ready, "pgflip", process, log)
        yield
        if process.poll() is not None:
            say(f"pgflip has ended by itself ({process.returncode}): see {log}")
    finally:
        # The second one ends it at once, whatever a suite has left open.
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        stop(process, signal.SIGTERM)


def run(suite: suites.Suite, way: str, binaries: Path, program: Path, only: str | None) -> dict:
    kept = CACHE / "results"
    kept.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgflip-suites-")))
        port, server = suite.port or free_port(), free_port()
        if way == "direct":
            server = port
        stack.enter_context(postgres(suite, way, binaries, directory, server))
        if way != "direct":
            log = kept / f"{suite.name}.{way}.pgflip.log"
            stack.enter_context(pgflip(suite, program, way, directory, server, port, log))
        started = time.monotonic()
        place = Place("127.0.0.1", port, environment(), directory, binaries)
        tests = suite.run(place, only)
        seconds = time.monotonic() - started
        shutil.copyfile(directory / "postgres.log", kept / f"{suite.name}.{way}.postgres.log")
    counts = {
        outcome: sum(test["outcome"] == outcome for test in tests.values())
        for outcome in ("passed", "failed", "skipped")
    }
    say(
        f"{suite.name}, {way}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + f" in {seconds:.0f} s"
    )
    (kept / f"{suite.name}.{way}.json").write_text(json.dumps(tests, indent=1))
    return tests


def compare(suite: suites.Suite, way: str, direct: dict, through: dict) -> bool:
    """Prints what differs; says whether anything that passed directly did not pass through pgflip."""
    worse = False
    for name in sorted(direct.keys() | through.keys()):
        missing = {"outcome": "not there", "said": ""}
        one, other = direct.get(name, missing), through.get(name, missing)
        otherwise = (
            one["outcome"] == other["outcome"] == "failed" and suite.failures_alike and one["said"] != other["said"]
        )
        if one["outcome"] != other["outcome"] or otherwise:
            bad = one["outcome"] == "passed" or otherwise
            worse |= bad
            print(
                f"{suite.name}, {way}: {name}: {one['outcome']} directly, "
                f"{'otherwise ' if otherwise else ''}{other['outcome']} through pgflip"
            )
            if bad:
                lines = [line for line in other["said"].strip().splitlines() if line.strip()]
                print("".join(f"    {line[:200]}\n" for line in lines[-suite.lines :]), end="")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="+", choices=[*suites.ALL, "all"])
    parser.add_argument("--ways", default=",".join(WAYS), help="some of " + ",".join(WAYS))
    parser.add_argument("--only", help="tests whose name has this in it, as far as the suite can choose")
    asked = parser.parse_args()
    ways = asked.ways.split(",")
    if not set(ways) <= set(WAYS):
        parser.error(f"--ways: some of {','.join(WAYS)}")

    if "PGFLIP_BIN" in os.environ:
        program = Path(os.environ["PGFLIP_BIN"])
    else:
        subprocess.run(["cargo", "build", "--quiet"], cwd=REPOSITORY, check=True)
        program = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "debug" / "pgflip"

    worse = False
    for name in suites.ALL if "all" in asked.suite else asked.suite:
        suite = suites.ALL[name]()
        binaries = suite.prepare()
        found = {way: run(suite, way, binaries, program, asked.only) for way in ways}
        for way in ways:
            if way != "direct" and "direct" in found:
                worse |= compare(suite, way, found["direct"], found[way])
    sys.exit(worse)


if __name__ == "__main__":
    main()
