#!/bin/sh
# One call on a machine with a GPU, no network: does training work there, how fast is it, is the memory estimate right?
#   scripts/gpu_check.sh [--size 1.5b|tiny] [--device cuda|cpu] [--out docs/gpu] [...]      scripts/gpu_check.py --help
# It uses the Python that is active (PYTHON overrides it), with poise_hpc and, for the comparison, TRL installed.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python}" scripts/gpu_check.py "$@"
