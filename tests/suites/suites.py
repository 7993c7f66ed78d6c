"""The suites: where each comes from, what it needs, how it is run, and how its tests' outcomes are read."""
from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("PGFLIP_SUITES_CACHE", "/var/tmp/pgflip-suites"))
# A whole suite, and a single test.
SUITE_LIMIT, TEST_LIMIT = 3600, 60


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@dataclass
class Place:
    """Where a suite is to connect to, as superuser `postgres`, who needs no password."""
    host: str
    port: int
    environment: dict
    directory: Path
    binaries: Path


class Suite:
    name: str
    # Major version of the server, found or fetched by deploy/postgres.sh. Debian's has all extensions.
    postgres = 15
    databases = ["postgres"]
    # For the server's settings; statements by database, run in this order; who has to show what (pgflip's rules as well).
    settings: dict = {}
    sql: list[tuple[str, str]] = []
    rules = "host all,replication all 127.0.0.1/32 trust\n"
    # Where a suite insists on a port.
    port: int | None = None
    # Failures are compared by what they say: where they say what was expected, and not where and when.
    failures_alike = False
    # How much of a failure is shown.
    lines = 6

    def prepare(self) -> Path:
        """Fetches what is missing. Returns the directory with the server's programs."""
        self.fetch()
        found = subprocess.run([REPOSITORY / "deploy" / "postgres.sh", "--tools", str(self.postgres)], check=True,
                               stdout=subprocess.PIPE, text=True)
        return Path(found.stdout.strip())

    def fetch(self) -> None:
        raise NotImplementedError

    def run(self, place: Place, only: str | None) -> dict:
        """Each test's name, its outcome, and what it said."""
        raise NotImplementedError


def outcome(outcome: str, said: str = "") -> dict:
    return {"outcome": outcome, "said": said}


def once(name: str, what: str) -> tuple[Path, bool]:
    """A directory of the cache for `what`, and whether it is still to be filled. `done` says that it has been."""
    directory = CACHE / name
    ready = directory / "ready"
    if ready.exists() and ready.read_text() == what:
        return directory, False
    subprocess.run(["rm", "-rf", directory], check=True)
    directory.mkdir(parents=True)
    say(f"fetching {what}")
    return directory, True


def done(directory: Path, what: str) -> None:
    (directory / "ready").write_text(what)


def unpack(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(directory)


class Pytest(Suite):
    """A suite that pytest runs: the source distribution's tests, with the driver as it is installed from PyPI."""
    # What is installed; and whose source distribution has the tests, and where in it.
    packages: list[str]
    source: str
    tests: list[str]
    arguments: list[str] = []

    def fetch(self) -> None:
        what = " ".join([*self.packages, self.source])
        self.directory, missing = once(self.name, what)
        if missing:
            subprocess.run([sys.executable, "-m", "venv", self.directory / "python"], check=True)
            pip = [self.directory / "python" / "bin" / "pip", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "pytest==8.*", "pytest-timeout==2.*", *self.packages], check=True)
            subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", self.directory, self.source],
                           check=True)
            [archive] = self.directory.glob("*.tar.gz")
            unpack(archive, self.directory)
            self.unpacked(self.directory / archive.name.removesuffix(".tar.gz"))
            done(self.directory, what)
        [archive] = self.directory.glob("*.tar.gz")
        self.root = self.directory / archive.name.removesuffix(".tar.gz")

    def unpacked(self, root: Path) -> None:
        """What is changed in the source distribution. The driver's own modules would be found before the installed ones."""

    def variables(self, place: Place) -> dict:
        return {"PGHOST": place.host, "PGPORT": str(place.port), "PGUSER": "postgres", "PGDATABASE": "postgres"}

    def where(self, place: Place) -> list[str]:
        return []

    def run(self, place: Place, only: str | None) -> dict:
        report = place.directory / "report.xml"
        command = [self.directory / "python" / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "--tb=short", f"--timeout={TEST_LIMIT}", f"--junitxml={report}", *self.arguments, *self.where(place),
                   *(["-k", only] if only else []), *self.tests]
        ended = subprocess.run(command, cwd=self.root, env=place.environment | self.variables(place),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SUITE_LIMIT)
        if not report.exists():
            sys.exit(f"{self.name}: pytest made no report\n{ended.stdout.decode(errors='replace')[-3000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [part for part in case if part.tag in ("failure", "error")]
            said = "\n".join((part.text or "") + "\n" + part.get("message", "") for part in bad)
            kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            name = f"{case.get('classname')}.{case.get('name')}"
            # A test may fail, and what tidies up after it as well.
            if name not in found or kind == "failed":
                found[name] = outcome(kind, said)
        return found


class Asyncpg(Pytest):
    name = "asyncpg"
    packages = ["asyncpg==0.31.0", "distro"]
    source = "asyncpg==0.31.0"
    tests = ["tests"]
    # Those that tests make are named beforehand.
    databases = ["postgres", "testdb", "asyncpg_intro_test"]

    def unpacked(self, root: Path) -> None:
        (root / "asyncpg").rename(root / "asyncpg.source")


class Psycopg2(Pytest):
    name = "psycopg2"
    packages = ["psycopg2-binary==2.9.13"]
    source = "psycopg2==2.9.13"
    tests = ["tests"]
    databases = ["postgres", "psycopg2_test"]
    sql = [("postgres", "create database psycopg2_test"), ("psycopg2_test", "create extension hstore")]

    def variables(self, place: Place) -> dict:
        return {"PSYCOPG2_TESTDB": "psycopg2_test", "PSYCOPG2_TESTDB_HOST": place.host,
                "PSYCOPG2_TESTDB_PORT": str(place.port), "PSYCOPG2_TESTDB_USER": "postgres"}


class Debian(Suite):
    """A suite in a source package of Debian, fetched by apt with a configuration of its own: nothing is installed."""
    package: str
    # Of which release, if it is not to be the one that this machine has.
    release: str | None = None
    # The archive in it that has the suite.
    archive: str

    def fetch(self) -> None:
        what = f"source package {self.package} of Debian"
        self.directory, missing = once(self.name, what)
        if missing:
            self.download()
            [archive] = self.directory.glob(self.archive)
            say(f"fetched {archive.name}")
            unpack(archive, self.directory)
            self.build(self.root())
            done(self.directory, what)

    def root(self) -> Path:
        [root] = (path.parent for path in self.directory.glob("*/" + self.landmark))
        return root

    # A file in the archive's first directory.
    landmark: str

    def build(self, root: Path) -> None:
        """What has to be made before its first run."""

    def download(self) -> None:
        apt = self.directory / "apt"
        for part in ("lists/partial", "cache/archives/partial", "sources"):
            (apt / part).mkdir(parents=True)
        # The machine's own sources, but of sources. Those of security updates don't keep what came before the newest.
        system = Path("/etc/apt")
        for file in [system / "sources.list", *(system / "sources.list.d").glob("*")]:
            if not file.exists() or file.suffix not in (".list", ".sources"):
                continue
            taken = []
            for part in file.read_text().split("\n\n" if file.suffix == ".sources" else "\n"):
                if "-security" in part or "debian" not in part:
                    continue
                if file.suffix == ".sources":
                    part = re.sub(r"(?m)^Types:.*", "Types: deb-src", part)
                    part = re.sub(r"(?m)^Suites:.*", f"Suites: {self.release}", part) if self.release else part
                else:
                    part = re.sub(r"^deb ", "deb-src ", part)
                    part = re.sub(r"^(deb-src (?:\[.*?\] )?\S+) \S+", rf"\1 {self.release}", part) if self.release else part
                taken.append(part)
            (apt / "sources" / file.name).write_text("\n\n".join(taken) + "\n")
        (apt / "apt.conf").write_text(f'''
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{apt}/sources";
Dir::State::lists "{apt}/lists";
Dir::Cache "{apt}/cache";
APT::Sandbox::User "{pwd.getpwuid(os.geteuid()).pw_name}";
''')
        run = {"cwd": self.directory, "env": os.environ | {"APT_CONFIG": str(apt / "apt.conf")}, "stdout": sys.stderr}
        subprocess.run(["apt-get", "-qq", "update"], check=True, **run)
        # Some mirrors don't have every file of a package: what came is looked at, and not what apt says.
        subprocess.run(["apt-get", "-qq", "source", "--download-only", self.package], **run)
        if not list(self.directory.glob(self.archive)):
            sys.exit(f"{self.name}: apt could not fetch {self.archive} of {self.package}")


class Regress(Debian):
    """PostgreSQL's own regression tests, all of one schedule. Server, psql and tests are of one version: built here."""
    name = "pg_regress"
    package = "postgresql-15"
    archive = "postgresql-15_*.orig.tar.bz2"
    landmark = "configure"
    databases = ["postgres", "regression"]
    # As pg_regress sets up a server of its own.
    settings = {"max_prepared_transactions": 2, "log_lock_waits": "on", "log_temp_files": "128kB"}
    failures_alike = True
    lines = 40
    schedule = "parallel_schedule"

    def build(self, root: Path) -> None:
        say("building it takes some minutes")
        install = self.directory / "install"
        with (self.directory / "build.log").open("wb") as log:
            def command(*words: str | Path) -> None:
                subprocess.run(words, cwd=root, check=True, stdout=log, stderr=log)
            command("./configure", f"--prefix={install}", "--without-readline", "--without-zlib", "CFLAGS=-O1")
            command("make", f"-j{os.cpu_count()}")
            command("make", "install")
            command("make", "-C", "src/test/regress")

    def prepare(self) -> Path:
        self.fetch()
        return self.directory / "install" / "bin"

    def run(self, place: Place, only: str | None) -> dict:
        source = self.root() / "src" / "test" / "regress"
        output = place.directory / "regress"
        for directory in (output, output / "results", output / "testtablespace"):
            directory.mkdir()
            # The server writes there as well.
            directory.chmod(0o777)
        command = [source / "pg_regress", f"--inputdir={source}", f"--outputdir={output}", f"--bindir={place.binaries}",
                   f"--dlpath={source}", f"--host={place.host}", f"--port={place.port}", "--user=postgres",
                   "--max-concurrent-tests=20", *([only] if only else [f"--schedule={source / self.schedule}"])]
        ended = subprocess.run(command, cwd=output, env=place.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, timeout=SUITE_LIMIT)
        differences = output / "regression.diffs"
        parts = re.split(r"(?m)^diff -U3 .*\n--- .*\n\+\+\+ \S*/(\w+)\.out\t.*\n",
                         differences.read_text(errors="replace") if differences.exists() else "")
        said = dict(zip(parts[1::2], parts[2::2]))
        found = {}
        for name, how in re.findall(r"(?m)^(?:test | {5}|ok \d+ .*?|not ok \d+ .*?)(\w+) +\.\.\. (ok|FAILED|failed)", ended.stdout):
            found[name] = outcome("passed" if how == "ok" else "failed", said.get(name, "").replace(str(output), ""))
        if not found:
            sys.exit(f"{self.name}: {ended.stdout[-3000:]}")
        return found


ALL = {suite.name: suite for suite in (Asyncpg, Psycopg2, Regress)}
