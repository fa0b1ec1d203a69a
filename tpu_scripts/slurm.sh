#!/usr/bin/env bash
# Submits a run to the GPU nodes of a Slurm cluster.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: slurm.sh [--dry-run] [--SETTING VALUE ...] NAME FILE.py [flags of llmlab train ...]

Submits slurm/train.sbatch as the job NAME: one process per GPU, which find each other by Slurm's variables. Five
minutes before the time limit, and when preempted, llmlab saves and exits with 42, and the job is queued again, at
most LLMLAB_MAX_RESTARTS times. Run it from the top of the repository, in an environment with llmlab installed; the
nodes see the same files. Without --out the run goes to LLMLAB_BUCKET/NAME where that is a directory, else (a bucket of
Cloud Storage is not mounted on a cluster) to runs/NAME.

    squeue --me --name NAME         scancel --me --name NAME

Settings: SLURM_PARTITION SLURM_ACCOUNT SLURM_NODES SLURM_GPUS_PER_NODE SLURM_CPUS_PER_TASK SLURM_TIME SLURM_LOGS
BUCKET MAX_RESTARTS"

main() {
  local gpus="${CONFIG[SLURM_GPUS_PER_NODE]}"
  local -a flags=(--job-name "$NAME" --nodes "${CONFIG[SLURM_NODES]}" --gpus-per-node "$gpus"
    --ntasks-per-node "$gpus" --cpus-per-task "${CONFIG[SLURM_CPUS_PER_TASK]}" --time "${CONFIG[SLURM_TIME]}"
    --output "${CONFIG[SLURM_LOGS]}/%x-%j.out" --export "ALL,LLMLAB_MAX_RESTARTS=${CONFIG[MAX_RESTARTS]}")
  require_name
  require_number SLURM_NODES SLURM_GPUS_PER_NODE SLURM_CPUS_PER_TASK MAX_RESTARTS
  if [[ -z ${CONFIG[BUCKET]} || ${CONFIG[BUCKET]} == *://* ]]; then
    CONFIG[BUCKET]=runs # the nodes of a cluster share a file system
  fi
  require_experiment
  if [[ $OUT == *://* ]]; then
    usage_error "nothing mounts $(quoted "$OUT") on the nodes of a cluster; give --out a directory that they all see"
  fi
  [[ -z ${CONFIG[SLURM_PARTITION]} ]] || flags+=(--partition "${CONFIG[SLURM_PARTITION]}")
  [[ -z ${CONFIG[SLURM_ACCOUNT]} ]] || flags+=(--account "${CONFIG[SLURM_ACCOUNT]}")
  run_command mkdir -p -- "${CONFIG[SLURM_LOGS]}" # Slurm does not make it, and drops the output of the job
  run_command sbatch "${flags[@]}" "$SCRIPTS/slurm/train.sbatch" llmlab train "${REST[@]}"
}

parse_arguments "$@"
main
