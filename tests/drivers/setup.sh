#!/usr/bin/env bash
# Installs what tests/drivers.rs runs against pgflip, by package name: from PyPI into a virtual environment, from npm, and
# from Debian by apt. Prints a line for each driver that can be run here: its name and the words of the command, tabs between
# them; a connection string and a number of workers are to be added. What it does goes to stderr.
#
# sqlx takes minutes to build: only if PGFLIP_DRIVERS_SQLX is set.
#
# What can't be installed by whoever runs this (apt without root, no such package) is left out, and said. What can be and
# fails is an error. May be run again, and several times at once; it stays in $PGFLIP_DRIVERS_CACHE.
set -euo pipefail
shopt -s nullglob
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${PGFLIP_DRIVERS_CACHE:-/var/tmp/pgflip-drivers}
mkdir -p "$root"
[[ -O $root ]] || { echo "drivers: $root belongs to somebody else: set PGFLIP_DRIVERS_CACHE" >&2; exit 1; }
exec 9>"$root/lock"
flock 9

pypi=('psycopg[binary]==3.3.*' 'psycopg2-binary==2.9.*' 'asyncpg==0.32.*' 'SQLAlchemy==2.1.*' 'Django==5.2.*' 'pyodbc==5.*')
npm=(pg@8 postgres@3)
# Their sources alone: as installed packages they would bring half a hundred others along.
go=(golang-github-lib-pq-dev
  golang-github-jackc-{chunkreader-v2,pgconn,pgio,pgpassfile,pgproto3-v2,pgservicefile,pgtype,pgx-v4,puddle}-dev
  golang-golang-x-{crypto,text}-dev)

say() { printf 'drivers: %s\n' "$*" >&2; }
# $1 driver, $2 … its command
driver() { local IFS=$'\t'; printf '%s\n' "$*"; }
# A directory's name for what is in it: another list, or another source, is another directory.
key() { printf '%s\n' "$@" | sha256sum | cut -c1-12; }
apt_has() {
  command -v apt-get >/dev/null || return 1
  compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || ((EUID)) || apt-get update -qq >&2 ||
    { say "apt can't fetch its lists of packages"; exit 1; }
  apt-cache show --no-all-versions "$@" >/dev/null 2>&1
}
# Old lists name files that are gone: then once more with new ones.
again() { "$@" || { ((EUID == 0)) && apt-get update -qq >&2 && "$@"; }; }
install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 "$@" >&2
}
# For these drivers ($1): is something there ($2, a command that says so)? Else installs the packages $3 …, or returns 1 if
# that can't be done here.
need() {
  eval "$2" >/dev/null 2>&1 && return
  ((EUID == 0)) && apt_has "${@:3}" || { say "$1: left out, because ${*:3} of Debian can't be installed here"; return 1; }
  say "installing ${*:3}"
  again install "${@:3}" || { say "could not install ${*:3}"; exit 1; }
}

if need "drivers in Python, psql, psqlODBC" 'python3 -c "import ensurepip, venv"' python3 python3-venv; then
  python=$root/python-$(key "$(python3 --version)" "${pypi[@]}")
  if [[ ! -e $python/ready ]]; then
    say "installing ${pypi[*]} (PyPI)"
    rm -rf "$python"
    python3 -m venv "$python"
    "$python/bin/pip" install -q --disable-pip-version-check "${pypi[@]}" >&2
    touch "$python/ready"
  fi
  for script in psycopg3 psycopg2_ asyncpg_ sqlalchemy_ django_; do
    driver "${script%_}" "$python/bin/python" "$here/$script.py"
  done
  if tools=$("$here/../../deploy/postgres.sh" --tools 18); then
    driver psql "$python/bin/python" "$here/psql.py" "$tools/psql"
  else
    say "psql: left out, because Postgres 18 with its tools can't be had here"
  fi
  there='compgen -G "/usr/lib/*/libodbc.so.2" && compgen -G "/usr/lib/*/odbc/psqlodbcw.so"'
  if need psqlODBC "$there" libodbc2 odbc-postgresql; then
    library=(/usr/lib/*/odbc/psqlodbcw.so)
    driver psqlodbc "$python/bin/python" "$here/psqlodbc.py" "${library[0]}"
  fi
fi

if need 'node-postgres, postgres.js' 'command -v node && command -v npm' nodejs npm; then
  node=$root/node-$(key "${npm[@]}")
  if [[ ! -e $node/ready ]]; then
    say "installing ${npm[*]} (npm)"
    rm -rf "$node"
    mkdir -p "$node"
    (cd "$node" && npm init -y >/dev/null && npm install --silent --no-audit --no-fund "${npm[@]}" >&2)
    touch "$node/ready"
  fi
  driver node-pg node "$here/node_pg.js" "$node"
  driver postgres-js node "$here/postgres_js.js" "$node"
fi

jar=/usr/share/java/postgresql.jar
if need pgjdbc 'command -v javac' default-jdk-headless && need pgjdbc 'test -e $jar' libpostgresql-jdbc-java; then
  compiled=$root/java-$(key "$(javac -version 2>&1)" "$(sha256sum "$jar" "$here/Pgjdbc.java")")
  if [[ ! -e $compiled/ready ]]; then
    javac -Xlint:all -cp "$jar" -d "$compiled" "$here/Pgjdbc.java" >&2
    touch "$compiled/ready"
  fi
  driver pgjdbc java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp "$compiled:$jar" Pgjdbc
fi

if ! apt_has "${go[@]}"; then
  say "lib/pq, pgx: left out, because this is no distribution that has ${go[*]}"
elif need 'lib/pq, pgx' 'command -v go' golang-go; then
  built=$root/go-$(key "$(go version)" "$(cat "$here"/go/*/*.go)")
  if [[ ! -e $built/ready ]]; then
    say "fetching and building ${go[*]}"
    rm -rf "$built"
    mkdir -p "$built/packages" "$built/src"
    (cd "$built/packages" && again apt-get download -qq -o APT::Sandbox::User=root "${go[@]}" >&2)
    for package in "$built"/packages/*.deb; do dpkg-deb -x "$package" "$built/packages"; done
    cp -r "$here/go" "$built/src/pgflip"
    for name in lib_pq pgx; do
      CGO_ENABLED=0 GO111MODULE=off GOPATH="$built:$built/packages/usr/share/gocode" GOCACHE=$root/go-cache \
        go build -o "$built/$name" "pgflip/$name" >&2
    done
    for name in lib-pq jackc-pgx-v4; do
      dpkg-deb -f "$built"/packages/golang-github-"$name"-dev_*.deb Version >"$built/$name.version"
    done
    touch "$built/ready"
  fi
  driver lib-pq "$built/lib_pq" "$(<"$built/lib-pq.version")"
  driver pgx "$built/pgx" "$(<"$built/jackc-pgx-v4.version")"
fi

if [[ -n ${PGFLIP_DRIVERS_SQLX-} ]]; then
  say "building sqlx"
  cp -rT "$here/sqlx" "$root/sqlx"
  (cd "$root/sqlx" && CARGO_TARGET_DIR=target cargo build -q >&2)
  driver sqlx "$root/sqlx/target/debug/pgflip-driver-sqlx"
fi
