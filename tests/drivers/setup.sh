#!/usr/bin/env bash
# Installs the drivers that tests/drivers.rs runs against pgflip: psycopg 3 and asyncpg (a virtual environment), and
# node-postgres (npm), by package name. Prints the folder they are in; says what it does on stderr. May run twice at once.
set -euo pipefail
root=${PGFLIP_DRIVERS_CACHE:-/var/tmp/pgflip-drivers}
mkdir -p "$root"
exec 9>"$root/lock"
flock 9
say() { echo "drivers: $*" >&2; }

if [ ! -e "$root/python/ready" ]; then
    if ! python3 -m venv --help >/dev/null 2>&1 || ! python3 -c 'import ensurepip' 2>/dev/null; then
        say "installing python3-venv"
        apt-get update -qq >&2 && apt-get install -y -qq python3-venv >&2
    fi
    say "installing psycopg and asyncpg into $root/python"
    rm -rf "$root/python"
    python3 -m venv "$root/python"
    "$root/python/bin/pip" install -q --disable-pip-version-check 'psycopg[binary]==3.2.*' 'asyncpg==0.30.*' >&2
    touch "$root/python/ready"
fi
if [ ! -e "$root/node/ready" ]; then
    if ! command -v npm >/dev/null; then
        say "installing npm"
        apt-get update -qq >&2 && apt-get install -y -qq npm >&2
    fi
    say "installing node-postgres into $root/node"
    rm -rf "$root/node"
    mkdir -p "$root/node"
    (cd "$root/node" && npm init -y >/dev/null && npm install --silent --no-audit --no-fund pg@8 >&2)
    touch "$root/node/ready"
fi
echo "$root"
