#!/usr/bin/env bash
# Submits a run to a GKE cluster that xpk manages.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: xpk.sh [--dry-run] [--SETTING VALUE ...] NAME FILE.py [flags of llmlab train ...]
       xpk.sh [--dry-run] --attach
       xpk.sh [--dry-run] --delete NAME

Submits 'llmlab train FILE.py ...' as the xpk workload NAME, in the image LLMLAB_IMAGE (see gke/Dockerfile). xpk
restarts it after exit code 42 (preempted after saving) and after signals, at most LLMLAB_MAX_RESTARTS times, and not
after 1 or 2. --delete deletes the workload NAME and nothing else.

A run in a bucket (LLMLAB_BUCKET or --out gs://...) is written below $MOUNTS/BUCKET, where the pods see the bucket
as an xpk storage. --attach makes that storage of LLMLAB_BUCKET, once for a cluster and a bucket. LLMLAB_XPK_STORAGE
names another storage to mount, of any type; --out is then a directory below its mount point.

    xpk.sh --attach --bucket gs://my-bucket
    xpk.sh --bucket gs://my-bucket/runs nano experiments/quickstart.py

Settings: PROJECT ZONE CLUSTER IMAGE ACCELERATOR_TYPE SLICES BUCKET XPK_STORAGE MAX_RESTARTS GRACE_SECONDS"
SWITCHES=(attach delete)

# The name of the storage of BUCKET_NAME; it also names volumes of pods, so it has at most 60 of a-z, 0-9 and -.
storage_name() {
  local name="llmlab-${BUCKET_NAME//[._]/-}"
  if ((${#name} > 60)); then
    usage_error "the bucket's name $BUCKET_NAME is too long to name an xpk storage; attach it by hand under another" \
      "name, set LLMLAB_XPK_STORAGE to that, and pass --out its directory"
  fi
  printf '%s' "$name"
}

attach() {
  local name
  require BUCKET
  read_bucket_name "${CONFIG[BUCKET]}"
  name="$(storage_name)"
  # --size is asked for and means nothing to a bucket. Prefetching metadata is useless where none is cached.
  run_command xpk storage attach "$name" --cluster "${CONFIG[CLUSTER]}" "${LOCATION[@]}" --type gcsfuse \
    --bucket "$BUCKET_NAME" --mount-point "$MOUNTS/$BUCKET_NAME" --readonly false --auto-mount false --size 1 \
    --mount-options "$MOUNT_OPTIONS" --no-prefetch-metadata
}

submit() {
  local command storage="${CONFIG[XPK_STORAGE]}"
  local -a storages=()
  require ACCELERATOR_TYPE IMAGE
  require_number SLICES MAX_RESTARTS GRACE_SECONDS
  require_experiment
  mount_out
  if [[ -z $storage && -n $BUCKET_NAME ]]; then
    storage="$(storage_name)"
  fi
  if [[ -n $storage ]]; then
    storages=(--storage "$storage")
  fi
  command="$(quoted llmlab train "${REST[@]}")"
  if [[ $command == *$'\n'* ]]; then
    usage_error "xpk pastes the command into a YAML block, which a line break in $command would leave"
  fi
  # Kubernetes reads $(NAME) in a container's command as its own variable, and $$ as a plain $.
  run_command xpk workload create --workload "$NAME" --cluster "${CONFIG[CLUSTER]}" "${LOCATION[@]}" \
    --tpu-type "${CONFIG[ACCELERATOR_TYPE]}" --num-slices "${CONFIG[SLICES]}" --docker-image "${CONFIG[IMAGE]}" \
    --max-restarts "${CONFIG[MAX_RESTARTS]}" --termination-grace-period-seconds "${CONFIG[GRACE_SECONDS]}" \
    "${storages[@]}" --command "$(double_dollars "$command")"
}

main() {
  require_location
  require CLUSTER
  if on attach; then
    attach
    return
  fi
  require_name
  if on delete; then
    run_command xpk workload delete --workload "$NAME" --cluster "${CONFIG[CLUSTER]}" "${LOCATION[@]}"
  else
    submit
  fi
}

parse_arguments "$@"
main
