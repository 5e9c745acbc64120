#!/bin/bash
# Submit one of the wrappers in this folder as a site file says.
#
#   slurm/submit.sh [--dry-run] SITE WRAPPER ARGUMENTS...
#
# Run it with the Python environment of poise_hpc active (or POISE_HOST_PYTHON=/path/to/python). --dry-run prints the
# sbatch command and the site's set-up lines instead.
set -euo pipefail

dry=''
if [ "${1:-}" = --dry-run ]; then dry=yes; shift; fi
[ $# -ge 3 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
site=$1 wrapper=$2; shift 2
case ${wrapper##*/} in
  controller.sbatch | controller-step.sbatch) stage=controller kind=drive ;;
  train.sbatch) stage=train kind=train ;;
  evaluate.sbatch) stage=evaluate kind=evaluate ;;
  vllm-server.sbatch) stage=serve kind=vllm ;;
  *) echo "submit.sh: no wrapper of this folder: $wrapper" >&2; exit 2 ;;
esac

POISE_SLURM_DIR=$(dirname "$(realpath "$0")")
POISE_SITE=$(realpath -ms "$site")
POISE_HOST_PYTHON=$(command -v "${POISE_HOST_PYTHON:-python}") || { echo "submit.sh: no python on PATH; name one in POISE_HOST_PYTHON" >&2; exit 2; }
POISE_SBATCH=$("$POISE_HOST_PYTHON" -m poise_hpc.site options "$site" "$stage")
POISE_SETUP=$("$POISE_HOST_PYTHON" -m poise_hpc.site setup "$site")
POISE_PYTHON=$("$POISE_HOST_PYTHON" -m poise_hpc.site python "$site")
export POISE_SLURM_DIR POISE_SITE POISE_HOST_PYTHON POISE_SBATCH POISE_SETUP POISE_PYTHON

mapfile -t options <<<"$POISE_SBATCH"
# Both controller wrappers use this name, which `singleton` goes by: a campaign never has two of them at work.
path=$(realpath -ms "$1")
label=$(basename "$path" | tr -c 'A-Za-z0-9._\n-' _)
command=(sbatch "${options[@]}" --job-name="poise-$kind-$label-$(cksum <<<"$path" | cut -d' ' -f1)"
         "$POISE_SLURM_DIR/${wrapper##*/}" "$@")
if [ -n "$dry" ]; then
  printf '%q ' "${command[@]}"
  printf '\n\n%s\n' "$POISE_SETUP"
else
  source "$POISE_SLURM_DIR/forget_job.sh"
  forget_job
  "${command[@]}"
fi
