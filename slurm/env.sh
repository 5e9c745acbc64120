# shellcheck shell=bash
# Sourced by every wrapper here, in the job. What belongs to a site stands in its site file, never here: submit.sh
# hands that file's set-up lines over in POISE_SETUP (modules, venv, offline switches, job-local caches).
set -euo pipefail

if [ -n "${POISE_SETUP:-}" ]; then
  set +eu  # module and conda scripts are not written for these
  eval "$POISE_SETUP"
  set -eu
fi
export PYTHONUNBUFFERED=1

say() { printf '%(%FT%T)T %s\n' -1 "$*"; }

# The controller calls sbatch: it runs with this Python, outside the container that POISE_PYTHON may name.
export POISE_HOST_PYTHON=${POISE_HOST_PYTHON:-python}

source "${BASH_SOURCE[0]%/*}/forget_job.sh"

# What a job leaves on its node, if nothing is in it.
trap 'rmdir "${POISE_JOB_CACHE:-/nonexistent}" 2>/dev/null || true' EXIT

# Every rank of this job: the site's Python, with its container in front (POISE_PYTHON holds shell words), and arguments.
# At the warning (preemption or walltime near) all ranks get USR1. Exit code 75, "try again": they have saved, and the
# same job goes back into the queue. Otherwise the exit code is theirs.
run_ranks() {
  local code=0 step
  srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "exec ${POISE_PYTHON:-python} \"\$@\"" python "$@" &
  step=$!
  trap 'say "warned by Slurm: the ranks save and stop"; kill -USR1 "$step"' USR1
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait`, not srun
    code=0
    wait "$step" || code=$?
  done
  if [ "$code" -eq 75 ]; then
    say "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "no requeue here: submit the same command again, it resumes"
  fi
  return "$code"
}
