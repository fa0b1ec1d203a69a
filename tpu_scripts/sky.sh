#!/usr/bin/env bash
# Submits a run as a SkyPilot managed job, on the cheapest TPU or GPU it finds.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: sky.sh [--dry-run] [--SETTING VALUE ...] NAME FILE.py [flags of llmlab train ...]
       sky.sh [--dry-run] --delete NAME

Launches 'llmlab train FILE.py ...' as the managed job NAME: on a TPU slice (sky/tpu.yaml) where
LLMLAB_SKY_ACCELERATORS begins with tpu-, else on LLMLAB_SKY_NODES GPU nodes (sky/gpu.yaml), from a copy of the
working directory. SkyPilot starts it again, elsewhere if need be, after a preemption and after exit code 42.
--delete cancels the job NAME; SkyPilot then deletes its machines.

The run is written to a Cloud Storage bucket (LLMLAB_BUCKET or --out gs://...), which SkyPilot mounts at
$MOUNTS/BUCKET on every machine: nothing else survives a recovery. For another shared file system copy sky/gpu.yaml,
replace its file_mounts, name the copy with LLMLAB_SKY_TASK, and pass --out a directory there.

    sky.sh --sky-accelerators H100:8 nano experiments/quickstart.py

Settings: SKY_ACCELERATORS SKY_NODES SKY_TASK BUCKET SOURCE"
SWITCHES=(delete)

submit() {
  local task="$SCRIPTS/sky/gpu.yaml"
  local -a nodes=(--num-nodes "${CONFIG[SKY_NODES]}") bucket=()
  require_number SKY_NODES
  require_experiment
  mount_out
  if [[ -n $BUCKET_NAME ]]; then
    bucket=(--env "LLMLAB_BUCKET_NAME=$BUCKET_NAME")
  elif [[ -z ${CONFIG[SKY_TASK]} ]]; then
    usage_error "$OUT would be lost with the machine: give --out gs://... (or LLMLAB_BUCKET), which is mounted, or" \
      "with LLMLAB_SKY_TASK a task of your own that mounts another file system there"
  fi
  if [[ ${CONFIG[SKY_ACCELERATORS]} == tpu-* ]]; then
    task="$SCRIPTS/sky/tpu.yaml" nodes=()
  fi
  task="${CONFIG[SKY_TASK]:-$task}"
  # The task's shell runs the command line that this variable holds, so that its words arrive as they are here.
  run_command sky jobs launch --name "$NAME" --yes --detach-run --workdir "${CONFIG[SOURCE]}" \
    --gpus "${CONFIG[SKY_ACCELERATORS]}" "${nodes[@]}" "${bucket[@]}" --env "LLMLAB_COMMAND=$(quoted llmlab train "${REST[@]}")" "$task"
}

main() {
  require_name
  if on delete; then
    run_command sky jobs cancel --name "$NAME" --yes
  else
    submit
  fi
}

parse_arguments "$@"
main
