"""The suites: where each comes from, what it needs, how it is run, and how its tests' outcomes are read."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
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

    def server_rules(self, way: str) -> str:
        return self.rules

    def prepare(self) -> Path:
        """Fetches what is missing. Returns the directory with the server's programs."""
        self.fetch()
        found = subprocess.run(
            [REPOSITORY / "deploy" / "postgres.sh", "--tools", str(self.postgres)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
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
            subprocess.run(
                [
                    *pip,
                    "download",
                    "--no-deps",
                    "--no-binary",
                    self.source.split("==")[0],
                    "-d",
                    self.directory,
                    self.source,
                ],
                check=True,
            )
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
        command = [
            self.directory / "python" / "bin" / "python",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--timeout={TEST_LIMIT}",
            f"--junitxml={report}",
            *self.arguments,
            *self.where(place),
            *(["-k", only] if only else []),
            *self.tests,
        ]
        ended = subprocess.run(
            command,
            cwd=self.root,
            env=place.environment | self.variables(place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SUITE_LIMIT,
        )
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
        return {
            "PSYCOPG2_TESTDB": "psycopg2_test",
            "PSYCOPG2_TESTDB_HOST": place.host,
            "PSYCOPG2_TESTDB_PORT": str(place.port),
            "PSYCOPG2_TESTDB_USER": "postgres",
        }


class Sqlalchemy(Pytest):
    """psycopg 3, whose own tests no registry has, by those of SQLAlchemy that send most to a server."""

    name = "sqlalchemy"
    packages = ["sqlalchemy[asyncio]==2.1.9", "psycopg[binary]==3.3.9"]
    source = "sqlalchemy==2.1.9"
    tests = [
        "test/dialect/postgresql",
        "test/engine/test_execute.py",
        "test/engine/test_transaction.py",
        "test/sql/test_query.py",
        "test/sql/test_returning.py",
    ]
    databases = ["postgres", "test"]
    sql = [
        ("postgres", "create database test"),
        *(
            ("test", f"create {what}")
            for what in ("schema test_schema", "schema test_schema_2", "extension hstore", "extension citext")
        ),
    ]

    def where(self, place: Place) -> list[str]:
        return [f"--dburi=postgresql+psycopg://postgres:unused@{place.host}:{place.port}/test"]


class Django(Suite):
    """psycopg 3 by those of Django's tests that send most to a server, with server-side binding: prepared statements."""

    name = "django"
    packages = ["psycopg[binary]==3.3.9"]
    source = "django==5.2.19"
    applications = [
        "backends",
        "transactions",
        "transaction_hooks",
        "postgres_tests",
        "queries",
        "aggregation",
        "annotations",
        "bulk_create",
        "delete",
        "select_for_update",
        "schema",
        "introspection",
        "migrations",
        "model_fields",
        "timezones",
    ]
    databases = ["postgres", "test_django", "test_other"]

    def fetch(self) -> None:
        what = " ".join([*self.packages, self.source])
        self.directory, missing = once(self.name, what)
        if missing:
            subprocess.run([sys.executable, "-m", "venv", self.directory / "python"], check=True)
            pip = [self.directory / "python" / "bin" / "pip", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", self.source, *self.packages, "jinja2", "pillow"], check=True)
            subprocess.run(
                [*pip, "download", "--no-deps", "--no-binary", "django", "-d", self.directory, self.source], check=True
            )
            [archive] = self.directory.glob("*.tar.gz")
            unpack(archive, self.directory)
            done(self.directory, what)
        [archive] = self.directory.glob("*.tar.gz")
        self.root = self.directory / archive.name.removesuffix(".tar.gz")

    def run(self, place: Place, only: str | None) -> dict:
        database = {
            "ENGINE": "django.db.backends.postgresql",
            "USER": "postgres",
            "HOST": place.host,
            "PORT": str(place.port),
            "OPTIONS": {"server_side_binding": True},
        }
        (place.directory / "pgflip_settings.py").write_text(
            f"DATABASES = {{'default': {database | {'NAME': 'django'}}, 'other': {database | {'NAME': 'other'}}}}\n"
            "SECRET_KEY = 'none'\nUSE_TZ = False\nPASSWORD_HASHERS = ['django.contrib.auth.hashers.MD5PasswordHasher']\n"
            "DEFAULT_AUTO_FIELD = 'django.db.models.AutoField'\n"
        )
        ended = subprocess.run(
            [
                "timeout",
                str(SUITE_LIMIT),
                self.directory / "python" / "bin" / "python",
                "runtests.py",
                "--settings=pgflip_settings",
                "--noinput",
                "--parallel=1",
                "-v2",
                *(["-k", only] if only else []),
                *self.applications,
            ],
            cwd=self.root / "tests",
            env=place.environment | {"PYTHONPATH": str(place.directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        found = {}
        outcomes = {
            "ok": "passed",
            "expected failure": "passed",
            "FAIL": "failed",
            "ERROR": "failed",
            "unexpected success": "failed",
        }
        # A test's name, perhaps what it is about, and how it ended, behind whatever it has printed.
        for name, how in re.findall(
            r"(?m)^\w+ \(([\w.]+)\)(?:\n[^\n]*)?? \.\.\. (?:.*?)(ok|FAIL|ERROR|skipped|expected failure|unexpected success)\b",
            ended.stdout,
        ):
            found[name] = outcome(outcomes.get(how, "skipped"))
        for part in re.split(r"(?m)^={70}\n", ended.stdout)[1:]:
            if bad := re.match(r"(?:FAIL|ERROR): \w+ \(([\w.]+)\)(.*)", part):
                before = found.get(bad[1], outcome("failed"))
                found[bad[1]] = outcome("failed", before["said"] + part.split("\n" + "-" * 70 + "\nRan ")[0])
        if not re.search(r"(?m)^Ran \d+ tests", ended.stdout):
            sys.exit(f"{self.name}: {ended.stdout[-3000:]}")
        return found


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
                    part = (
                        re.sub(r"^(deb-src (?:\[.*?\] )?\S+) \S+", rf"\1 {self.release}", part)
                        if self.release
                        else part
                    )
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
        command = [
            source / "pg_regress",
            f"--inputdir={source}",
            f"--outputdir={output}",
            f"--bindir={place.binaries}",
            f"--dlpath={source}",
            f"--host={place.host}",
            f"--port={place.port}",
            "--user=postgres",
            "--max-concurrent-tests=20",
            *([only] if only else [f"--schedule={source / self.schedule}"]),
        ]
        ended = subprocess.run(
            command,
            cwd=output,
            env=place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SUITE_LIMIT,
        )
        differences = output / "regression.diffs"
        parts = re.split(
            r"(?m)^diff -U3 .*\n--- .*\n\+\+\+ \S*/(\w+)\.out\t.*\n",
            differences.read_text(errors="replace") if differences.exists() else "",
        )
        said = dict(zip(parts[1::2], parts[2::2]))
        found = {}
        for name, how in re.findall(
            r"(?m)^(?:test | {5}|ok \d+ .*?|not ok \d+ .*?)(\w+) +\.\.\. (ok|FAILED|failed)", ended.stdout
        ):
            found[name] = outcome("passed" if how == "ok" else "failed", said.get(name, "").replace(str(output), ""))
        if not found:
            sys.exit(f"{self.name}: {ended.stdout[-3000:]}")
        return found


class NodePostgres(Debian):
    """node-postgres with its pool and its cursor: the tests of the repository's archive in Debian's source package, with what
    they need from npm."""

    name = "node-postgres"
    package, release = "node-postgres", "sid"
    archive = "node-postgres_*.orig.tar.gz"
    landmark = "package.json"
    sql = [("postgres", "create role scram_user login password 'secret'")]
    rules = "host all scram_user 127.0.0.1/32 scram-sha-256\n" + Suite.rules
    # A test leaves a login unfinished, and ends when the server has had enough of that.
    settings = {"authentication_timeout": "10s"}
    lines = 12
    # Beside pg itself and what it depends on: the development dependencies that these tests make use of.
    packages = [
        "async@2.6.4",
        "bluebird@3.7.2",
        "co@4.6.0",
        "pg-copy-streams@0.3.0",
        "lodash@4",
        "expect.js@0.3.1",
        "mocha@10",
    ]

    def build(self, root: Path) -> None:
        # The archive has its packages as a workspace, with tools that take long to install.
        for file in ("package.json", "yarn.lock"):
            (root / file).unlink(missing_ok=True)
        ours = []
        for name in ("pg", "pg-connection-string", "pg-cursor", "pg-pool", "pg-protocol"):
            version = json.loads((root / "packages" / name / "package.json").read_text())["version"]
            ours.append(f"{name}@{version}")
        (root / "package.json").write_text("{}")
        subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", *ours, *self.packages],
            cwd=root,
            check=True,
            stdout=sys.stderr,
        )

    def run(self, place: Place, only: str | None) -> dict:
        root = self.root()
        variables = place.environment | {
            "PGHOST": place.host,
            "PGPORT": str(place.port),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
            "PGTESTNOSSL": "1",
            "SCRAM_TEST_PGUSER": "scram_user",
            "SCRAM_TEST_PGPASSWORD": "secret",
            "USER": "postgres",
        }
        pg = root / "packages" / "pg"
        subprocess.run(
            ["node", "script/create-test-tables.js"], cwd=pg, env=variables, check=True, stdout=subprocess.DEVNULL
        )
        found = {}
        # Each file is a program, as the Makefile there has it.
        for file in sorted((pg / "test" / "integration").rglob("*-tests.js")):
            name = str(file.relative_to(pg / "test"))
            if only and only not in name:
                continue
            try:
                ended = subprocess.run(
                    ["node", file],
                    cwd=pg,
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=TEST_LIMIT,
                )
                found[name] = outcome("failed" if ended.returncode else "passed", ended.stdout)
            except subprocess.TimeoutExpired as hanging:
                found[name] = outcome(
                    "failed", f"{(hanging.stdout or b'').decode()}\nhas not ended after {TEST_LIMIT} s"
                )
        for package in ("pg-pool", "pg-cursor"):
            report = place.directory / f"{package}.json"
            ended = subprocess.run(
                [
                    root / "node_modules" / ".bin" / "mocha",
                    "--reporter=json",
                    f"--reporter-option=output={report}",
                    "--exit",
                    *(["--grep", only] if only else []),
                ],
                cwd=root / "packages" / package,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SUITE_LIMIT,
            )
            if not report.exists():
                sys.exit(f"{self.name}: mocha made no report for {package}\n{ended.stdout[-3000:]}")
            told = json.loads(report.read_text())
            for kind, key in (("passed", "passes"), ("failed", "failures"), ("skipped", "pending")):
                for test in told[key]:
                    found[f"{package}: {test['fullTitle']}"] = outcome(kind, test["err"].get("stack", ""))
        return found


class RustPostgres(Suite):
    """tokio-postgres: the crate brings its tests along."""

    name = "tokio-postgres"
    crate, version = "tokio-postgres", "0.7.18"
    # It is in the tests.
    port = 5433
    sql = [
        (
            "postgres",
            "create role pass_user login password 'password'; create role scram_user login password 'password'",
        ),
        ("postgres", "create role ssl_user login"),
        ("postgres", "set password_encryption = md5; create role md5_user login password 'password'"),
        *(("postgres", f"create extension {name}") for name in ("hstore", "citext", "ltree")),
    ]
    rules = (
        "host all pass_user 127.0.0.1/32 password\nhost all md5_user 127.0.0.1/32 md5\n"
        "host all scram_user 127.0.0.1/32 scram-sha-256\n" + Suite.rules
    )

    def server_rules(self, way: str) -> str:
        # A password in clear is for pgflip to take; the server has to ask pgflip for SCRAM.
        return self.rules if way == "direct" else self.rules.replace(" password\n", " scram-sha-256\n")

    features = [
        "with-bit-vec-0_6",
        "with-chrono-0_4",
        "with-eui48-1",
        "with-geo-types-0_7",
        "with-serde_json-1",
        "with-time-0_3",
        "with-uuid-1",
        "array-impls",
    ]
    target = ["--test", "test"]

    def fetch(self) -> None:
        what = f"{self.crate} {self.version}"
        self.directory, missing = once(self.name, what)
        cargo = {
            "cwd": self.directory,
            "env": {name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"},
        }
        root = self.directory / self.crate
        if missing:
            (self.directory / "src").mkdir()
            (self.directory / "src" / "lib.rs").touch()
            (self.directory / "Cargo.toml").write_text(
                f'[package]\nname = "fetched"\n[dependencies]\n{self.crate} = "={self.version}"\n[workspace]\n'
            )
            told = subprocess.run(
                ["cargo", "metadata", "--format-version=1"], check=True, stdout=subprocess.PIPE, **cargo
            ).stdout
            [manifest] = (p["manifest_path"] for p in json.loads(told)["packages"] if p["name"] == self.crate)
            shutil.copytree(Path(manifest).parent, root)
            with (root / "Cargo.toml").open("a") as manifest:
                manifest.write("\n[workspace]\n")
        cargo["cwd"] = root
        say(f"building the tests of {what}")
        built = subprocess.run(
            [
                "cargo",
                "test",
                "--quiet",
                "--no-run",
                "--message-format=json",
                "--features",
                ",".join(self.features),
                *self.target,
            ],
            check=True,
            stdout=subprocess.PIPE,
            **cargo,
        ).stdout
        done(self.directory, what)
        messages = [json.loads(line) for line in built.splitlines() if line.startswith(b"{")]
        [self.program] = (m["executable"] for m in messages if m.get("executable") and m["profile"]["test"])

    def run(self, place: Place, only: str | None) -> dict:
        ended = subprocess.run(
            ["timeout", str(SUITE_LIMIT), self.program, *([only] if only else [])],
            cwd=place.directory,
            env=place.environment | {"RUST_BACKTRACE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found = {}
        for name, how in re.findall(r"(?m)^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED|ignored)", ended.stdout):
            said = re.search(rf"(?m)^---- {re.escape(name)} stdout ----\n((?:(?!----).*\n)*)", ended.stdout)
            found[name] = outcome({"ok": "passed", "FAILED": "failed"}.get(how, "skipped"), said[1] if said else "")
        if not found:
            sys.exit(f"{self.name}: {ended.stdout[-3000:]}")
        return found


class Postgres(RustPostgres):
    """The blocking driver on top of it."""

    name = "postgres"
    crate, version = "postgres", "0.19.14"
    features = ["with-serde_json-1"]
    target = ["--lib"]


ALL = {
    suite.name: suite
    for suite in (Asyncpg, Regress, RustPostgres, Postgres, NodePostgres, Sqlalchemy, Django, Psycopg2)
}
