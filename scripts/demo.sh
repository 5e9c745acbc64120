#!/usr/bin/env bash
# The whole discovery loop on this machine: sets itself up, then warm-starts a small language model, trains GRPO as the
# baseline, proposes, checks, trains, evaluates, reflects on and archives candidates, and prints the leaderboard.
#   scripts/demo.sh              go on with archive_store/demo, or start it
#   scripts/demo.sh --new        start another campaign (archive_store/demo-2, ...)
#   scripts/demo.sh NAME [...]   a campaign of that name; further arguments go to `poise-hpc run`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
name=demo
case "${1:-}" in
  --new) shift; n=2; while [ -e "archive_store/demo-$n" ]; do n=$((n + 1)); done; [ -e archive_store/demo ] && name=demo-$n ;;
  -*|"") ;;
  *) name=$1; shift ;;
esac
campaign=archive_store/$name
config=(--config configs/demo.yaml)
[ -e "$campaign/campaign.json" ] && { config=(); echo "demo: going on with $campaign (scripts/demo.sh --new starts another)"; }
started=$SECONDS
.venv/bin/poise-hpc run "$campaign" "${config[@]}" "$@"
echo "demo: $((SECONDS - started)) s; look closer with  .venv/bin/poise-hpc show $campaign c0001"
