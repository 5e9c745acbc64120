#!/usr/bin/env bash
# Make .venv with this package and what it needs (CPU build of torch by default). Does nothing when it is up to date.
#   scripts/setup.sh [EXTRA ...]      extras of setup.cfg, e.g. test bench
# PYTHON=...  another interpreter (3.11 or newer)      VENV=...  another folder than .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Python 3.11 or newer was wanted, found: ${python:-none}. Install it (Debian: apt-get install python3 python3-venv) or set PYTHON=" >&2
  exit 1
fi
extras=$(printf '%s\n' "$@" | sort -u | paste -sd, -)
stamp=$({ cat setup.cfg constraints.txt; echo "$extras"; "$python" -V; pwd; } | sha256sum | cut -d' ' -f1)
[ "$(cat "$venv/.stamp" 2>/dev/null || true)" = "$stamp" ] && exit 0

as_root() { if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then "$@"; else return 1; fi; }
if [ ! -x "$venv/bin/python" ]; then
  echo "setup: making $venv"
  if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    as_root bash -c 'apt-get -qq update && apt-get -qq -y -o DPkg::Lock::Timeout=300 install python3-venv >/dev/null' ||
      { echo "setup: $python cannot make a virtual environment: install the package python3-venv" >&2; exit 1; }
    "$python" -m venv "$venv"
  fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@" 2> >(grep -v 'WARNING: Location' >&2); }
echo "setup: installing torch and the other dependencies (a minute or two)"
pip install -c constraints.txt torch==$(sed -n 's/^torch==//p' constraints.txt)
pip install -c constraints.txt -e ".${extras:+[$extras]}"
echo "$stamp" > "$venv/.stamp"
echo "setup: done"
