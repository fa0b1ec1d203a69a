#!/usr/bin/env bash
# Submits a run to a GKE cluster that xpk manages.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: xpk.sh [--dry-run] [--SETTING VALUE ...] NAME FILE.py [flags of llmlab train ...]
       xpk.sh [--dry-run] --delete NAME

Submits 'llmlab train FILE.py ...' as the xpk workload NAME, in the image LLMLAB_IMAGE (see gke/Dockerfile). xpk
restarts it after exit code 42 (preempted after saving) and after signals, at most LLMLAB_MAX_RESTARTS times, and not
after 1 or 2. --delete deletes the workload NAME and nothing else.

Settings: PROJECT ZONE CLUSTER IMAGE ACCELERATOR_TYPE SLICES BUCKET MAX_RESTARTS GRACE_SECONDS"
SWITCHES=(delete)

submit() {
  local command
  require ACCELERATOR_TYPE IMAGE
  require_number SLICES MAX_RESTARTS GRACE_SECONDS
  require_experiment
  command="$(quoted llmlab train "${REST[@]}")"
  if [[ $command == *$'\n'* ]]; then
    usage_error "xpk pastes the command into a YAML block, which a line break in $command would leave"
  fi
  # Kubernetes reads $(NAME) in a container's command as its own variable, and $$ as a plain $.
  run_command xpk workload create --workload "$NAME" --cluster "${CONFIG[CLUSTER]}" "${LOCATION[@]}" \
    --tpu-type "${CONFIG[ACCELERATOR_TYPE]}" --num-slices "${CONFIG[SLICES]}" --docker-image "${CONFIG[IMAGE]}" \
    --max-restarts "${CONFIG[MAX_RESTARTS]}" --termination-grace-period-seconds "${CONFIG[GRACE_SECONDS]}" \
    --command "$(double_dollars "$command")"
}

main() {
  require_name
  require_location
  require CLUSTER
  if on delete; then
    run_command xpk workload delete --workload "$NAME" --cluster "${CONFIG[CLUSTER]}" "${LOCATION[@]}"
  else
    submit
  fi
}

parse_arguments "$@"
main
