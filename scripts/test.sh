#!/usr/bin/env bash
# Set up everything the tests need on this machine, then run them. Arguments go to pytest.
#   scripts/test.sh                     all but the soak tests (many random kills of a whole Slurm cluster)
#   scripts/test.sh --all               those too
#   scripts/test.sh -m "not slow"       the quick ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test math
export PATH="$PATH:/usr/sbin:/sbin"
slurm="munge slurmctld slurmd slurm-client slurmdbd mariadb-server"
lacks=''
for program in munged slurmctld slurmd sbatch slurmdbd mariadbd; do command -v $program >/dev/null || lacks+=" $program"; done
if [ -n "$lacks" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "test: installing Slurm's daemons for the tests on a real cluster: $slurm"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends install $slurm; } >/dev/null ||
      echo "test: that failed; tests marked slurm will be skipped"
  else
    echo "test: not here:$lacks. Tests on a real Slurm, or on its accounting, are left out: they need the packages $slurm (as root: apt-get install)"
  fi
fi
# One thread per process: reproducible to the bit, and two busy thread pools on few cores slow each other down.
export OMP_NUM_THREADS=1
marks=(-m "not soak")
[ "${1:-}" = --all ] && { shift; marks=(); }
exec .venv/bin/python -m pytest -q -rs ${marks[@]+"${marks[@]}"} "$@"
