#!/usr/bin/env bash
# Make .venv with this package and what it needs. Does nothing when it is up to date; extras that are there stay.
#   scripts/setup.sh [EXTRA ...]      extras of setup.cfg, e.g. test bench
# PYTHON=...  another interpreter (3.11 or newer)      VENV=...  another folder than .venv
# TORCH_INDEX_URL=...  where pip takes torch from: with or without CUDA. Without it pip's own settings hold; if they would bring
#   CUDA to a machine without an NVIDIA GPU, this stops before anything large is fetched. TORCH_INDEX_URL=any lets it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Python 3.11 or newer was wanted, found: ${python:-none}. Install it (Debian: apt-get install python3 python3-venv) or set PYTHON=" >&2
  exit 1
fi
had='' old=''
[ -e "$venv/.stamp" ] && { read -r old && read -r had || true; } <"$venv/.stamp"
extras=$(printf '%s\n' ${had//,/ } "$@" | sed '/^$/d' | sort -u | paste -sd, -)
stamp=$({ cat setup.cfg constraints.txt; "$python" -V; pwd; } | sha256sum | cut -d' ' -f1)
[ "$old" = "$stamp" ] && [ "$had" = "$extras" ] && exit 0

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
torch=$(grep '^torch==' constraints.txt)

would_take_cuda() {
  local newer=$venv/.pip report=$venv/.torch.json
  pip install --target "$newer" 'pip>=23.3' || return 1  # older ones fetch the wheel only to report on it
  PYTHONPATH=$newer pip install --dry-run --no-deps --ignore-installed --report "$report" "$torch" >/dev/null || return 1
  rm -rf "$newer"
  "$venv/bin/python" - "$report" <<'END'
import json, sys
from pip._vendor.packaging.requirements import Requirement
needs = map(Requirement, json.load(open(sys.argv[1]))["install"][0]["metadata"].get("requires_dist", ()))
here = [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
sys.exit(not any(n.name.startswith(("nvidia-", "cuda-")) for n in here))
END
}

if [ -z "${TORCH_INDEX_URL:-}" ] && ! command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -c 'import torch' 2>/dev/null && would_take_cuda; then
  cat >&2 <<'END'
setup: no NVIDIA GPU here, and pip would fetch torch with CUDA: gigabytes that nothing on this machine uses. Give the same command again with
  TORCH_INDEX_URL=...   the --index-url that pytorch.org names for pip and the compute platform CPU ("Get started")
  TORCH_INDEX_URL=any   to take it all the same
END
  exit 1
fi
index=()
[ "${TORCH_INDEX_URL:-any}" = any ] || index=(--index-url "$TORCH_INDEX_URL")
echo "setup: installing torch and the other dependencies (a minute or two)"
pip install -c constraints.txt ${index[@]+"${index[@]}"} "$torch"
pip install -c constraints.txt -e ".${extras:+[$extras]}"
printf '%s\n%s\n' "$stamp" "$extras" >"$venv/.stamp"
echo "setup: done"
