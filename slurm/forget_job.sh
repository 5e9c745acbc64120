# shellcheck shell=bash
# Jobs submitted from inside a job must not inherit its shape: a leftover SLURM_MEM_PER_NODE makes their srun fail.
forget_job() {
  local name
  for name in $(compgen -e SLURM_) $(compgen -e SRUN_) $(compgen -e SBATCH_); do
    case $name in SLURM_CONF | SLURM_CLUSTERS) ;; *) unset "$name" ;; esac
  done
}
