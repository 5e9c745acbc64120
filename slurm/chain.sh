# shellcheck shell=bash
# Sourced by the controller wrappers: a chain of jobs with one name, of which one runs at a time.
#
# The next link is submitted when a link starts, not when it ends, so that a killed node cannot break the chain.
# `singleton` makes it wait for this one; a link that Slurm requeued finds its successor by name and adds none.

chain=$SLURM_JOB_NAME

# A person's defaults (SQUEUE_PARTITION, SCANCEL_STATE ...) would hide the waiting link: each link would add another two.
for name in $(compgen -e SQUEUE_) $(compgen -e SCANCEL_); do unset "$name"; done

add_link() {  # add_link MINUTES SCRIPT ARGUMENTS...   with the options this link was started with
  local minutes=$1 waiting options; shift
  waiting=$(squeue --noheader --user="$(id -un)" --name="$chain" --states=PENDING --format=%A)
  [ -z "$waiting" ] || return 0
  mapfile -t options <<<"${POISE_SBATCH:---parsable}"
  (forget_job
   sbatch "${options[@]}" --job-name="$chain" --dependency=singleton --begin="now+${minutes}minutes" "$@") ||
    { say "Slurm takes no further link now"; return 1; }
}

end_chain() {  # end_chain REASON   takes the waiting link out; this one ends by itself
  say "$1; no further link"
  scancel --user="$(id -un)" --name="$chain" --state=PENDING
}

over() {  # over CAMPAIGN   done, or only a person can go on
  "$POISE_HOST_PYTHON" -m poise_hpc.cli status "$1" --json | "$POISE_HOST_PYTHON" -c '
import json, sys
status = json.load(sys.stdin)
sys.exit(not (status["done"] or status["held"] and not status["running"]))'
}

# link_ended CODE MINUTES SCRIPT CAMPAIGN ARGUMENTS...   what an exit code of poise-hpc means for the chain
link_ended() {
  local code=$1 failed; shift
  failed=$(cat "$chain.failed" 2>/dev/null || echo 0)
  case $code in
    2) end_chain "poise-hpc cannot run like this (exit code 2)"; return ;;
    126 | 127)  # one node may lack the environment; three in a row are no accident
      failed=$((failed + 1))
      echo "$failed" >"$chain.failed"
      if [ "$failed" -ge 3 ]; then rm -f "$chain.failed"; end_chain "poise-hpc does not start (exit code $code)"; return; fi
      say "poise-hpc does not start on $(hostname -s) (exit code $code)" ;;
    *) rm -f "$chain.failed"
      if over "$3"; then end_chain "$3 is done or needs a person (exit code $code)"; return; fi ;;
  esac
  trap '' USR1 TERM  # near the walltime every second counts
  until add_link "$@"; do sleep "${POISE_LINK_PAUSE_S:-20}"; done
}
