#!/usr/bin/env bash
# Submits a run to a GKE cluster as a JobSet.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: gke.sh [--dry-run] [--spot|--on-demand] [--SETTING VALUE ...] NAME FILE.py [flags of llmlab train ...]
       gke.sh [--dry-run] --delete NAME

Renders gke/jobset.yaml.tmpl and creates the JobSet NAME with kubectl: one job per slice, one pod per TPU host, in
the image LLMLAB_IMAGE (see gke/Dockerfile). It is restarted after exit code 42 (preempted after saving), after
signals and after evictions, at most LLMLAB_MAX_RESTARTS times, and fails at once after 1 or 2. --dry-run prints the
manifest. --delete deletes the JobSet that carries the label llmlab-run=NAME.

A run in a bucket (LLMLAB_BUCKET or --out gs://...) is written below $MOUNTS/BUCKET, where the cluster's Cloud
Storage FUSE driver mounts it in every pod. The pods read and write it as LLMLAB_GKE_SERVICE_ACCOUNT, a Kubernetes
service account with access to the bucket by workload identity; without one as the service account of the nodes.

Settings: NAMESPACE IMAGE GKE_ACCELERATOR GKE_TOPOLOGY GKE_CHIPS_PER_HOST GKE_SERVICE_ACCOUNT SLICES PROVISIONING
BUCKET MAX_RESTARTS GRACE_SECONDS"
SWITCHES=(delete)
declare -A VALUES=()

# A YAML (and JSON) string: in double quotes, with everything that has a meaning there escaped.
yaml_string() {
  local text="$1" backslash=$'\\'
  text="${text//"$backslash"/"$backslash$backslash"}"
  text="${text//\"/"$backslash\""}"
  text="${text//$'\n'/"${backslash}n"}"
  text="${text//$'\t'/"${backslash}t"}"
  text="${text//$'\r'/"${backslash}r"}"
  printf '"%s"' "$text"
}

# Refuses words with control characters other than those that yaml_string escapes.
require_printable() {
  local word control='[[:cntrl:]]'
  for word in "$@"; do
    word="${word//[$'\n\t\r']/}"
    if [[ $word =~ $control ]]; then
      usage_error "$(printf '%q' "$word") has a control character, which a manifest cannot carry"
    fi
  done
}

# The words as a YAML flow sequence of strings.
yaml_list() {
  local word list=""
  for word in "$@"; do
    list+="${list:+, }$(yaml_string "$word")"
  done
  printf '[%s]' "$list"
}

# Hosts of one slice: the product of the topology over the chips of a host.
hosts_per_slice() {
  local chips=1 side
  if [[ ! ${CONFIG[GKE_TOPOLOGY]} =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
    usage_error "LLMLAB_GKE_TOPOLOGY=${CONFIG[GKE_TOPOLOGY]} must be like 4x4 or 2x2x4"
  fi
  for side in ${CONFIG[GKE_TOPOLOGY]//x/ }; do
    chips=$((chips * side))
  done
  if ((CONFIG[GKE_CHIPS_PER_HOST] < 1 || chips % CONFIG[GKE_CHIPS_PER_HOST])); then
    usage_error "the $chips chips of LLMLAB_GKE_TOPOLOGY=${CONFIG[GKE_TOPOLOGY]} are no multiple of" \
      "LLMLAB_GKE_CHIPS_PER_HOST=${CONFIG[GKE_CHIPS_PER_HOST]}"
  fi
  printf '%s' $((chips / CONFIG[GKE_CHIPS_PER_HOST]))
}

# Sets VALUES: what stands for every {{KEY}} of the template. Strings are quoted for YAML, numbers checked.
fill_values() {
  local word nodes hosts
  local -a command=()
  for word in llmlab train "${REST[@]}"; do
    command+=("$(double_dollars "$word")")
  done
  nodes="\"cloud.google.com/gke-tpu-accelerator\": $(yaml_string "${CONFIG[GKE_ACCELERATOR]}")"
  nodes+=", \"cloud.google.com/gke-tpu-topology\": $(yaml_string "${CONFIG[GKE_TOPOLOGY]}")"
  if [[ ${CONFIG[PROVISIONING]} == spot ]]; then
    nodes+=', "cloud.google.com/gke-spot": "true"'
  fi
  hosts="$(hosts_per_slice)"
  VALUES=(
    [NAME]="$(yaml_string "$NAME")" [NAMESPACE]="$(yaml_string "${CONFIG[NAMESPACE]}")"
    [IMAGE]="$(yaml_string "${CONFIG[IMAGE]}")" [COMMAND]="$(yaml_list "${command[@]}")"
    [NODE_SELECTOR]="{$nodes}" [SLICES]="${CONFIG[SLICES]}" [HOSTS]="$hosts" [CHIPS]="${CONFIG[GKE_CHIPS_PER_HOST]}"
    [MAX_RESTARTS]="${CONFIG[MAX_RESTARTS]}" [GRACE_SECONDS]="${CONFIG[GRACE_SECONDS]}"
    [SERVICE_ACCOUNT]="" [POD_ANNOTATIONS]="" [VOLUMES]="" [VOLUME_MOUNTS]=""
  )
  if [[ -n ${CONFIG[GKE_SERVICE_ACCOUNT]} ]]; then
    VALUES[SERVICE_ACCOUNT]="serviceAccountName: $(yaml_string "${CONFIG[GKE_SERVICE_ACCOUNT]}")"
  fi
  if [[ -n $BUCKET_NAME ]]; then
    fill_mount
  fi
}

# The bucket's volume. The driver's sidecar container may use what the node has ("0": no limit): it stages whole files
# of a checkpoint. Pods on the network of their host reach the bucket as the node, unless told to be themselves.
fill_mount() {
  local attributes
  attributes="\"bucketName\": $(yaml_string "$BUCKET_NAME"), \"mountOptions\": $(yaml_string "$MOUNT_OPTIONS")"
  if [[ -n ${CONFIG[GKE_SERVICE_ACCOUNT]} ]]; then
    attributes+=', "hostNetworkPodKSA": "true"'
  fi
  VALUES[POD_ANNOTATIONS]='annotations: {"gke-gcsfuse/volumes": "true", "gke-gcsfuse/cpu-limit": "0",'
  VALUES[POD_ANNOTATIONS]+=' "gke-gcsfuse/memory-limit": "0", "gke-gcsfuse/ephemeral-storage-limit": "0"}'
  VALUES[VOLUMES]="volumes: [{\"name\": \"bucket\", \"csi\": {\"driver\": \"gcsfuse.csi.storage.gke.io\","
  VALUES[VOLUMES]+=" \"volumeAttributes\": {$attributes}}}]"
  VALUES[VOLUME_MOUNTS]="volumeMounts: [{\"name\": \"bucket\", \"mountPath\":"
  VALUES[VOLUME_MOUNTS]+=" $(yaml_string "$MOUNTS/$BUCKET_NAME")}]"
}

# The template with its values. Each line is read once from left to right, so a value is never read as a template. A
# line whose values are all empty is left out.
render() {
  local line key done_part
  while IFS= read -r line; do
    done_part=""
    while [[ $line =~ \{\{([A-Z_]+)\}\} ]]; do
      key="${BASH_REMATCH[1]}"
      done_part+="${line%%"{{$key}}"*}${VALUES[$key]}"
      line="${line#*"{{$key}}"}"
    done
    if [[ $done_part$line == *[![:space:]]* ]]; then
      printf '%s\n' "$done_part$line"
    fi
  done <"$SCRIPTS/gke/jobset.yaml.tmpl"
}

submit() {
  local manifest
  require IMAGE
  require_number SLICES MAX_RESTARTS GRACE_SECONDS GKE_CHIPS_PER_HOST
  require_experiment
  mount_out
  require_printable "${REST[@]}" "${CONFIG[@]}"
  fill_values
  manifest="$(render)"
  if dry_run; then
    printf '%s\n' "kubectl create --filename - <<'MANIFEST'" "$manifest" MANIFEST
  else
    run_command kubectl create --filename - <<<"$manifest"
  fi
}

main() {
  require_name
  if on delete; then
    run_command kubectl delete jobset --namespace "${CONFIG[NAMESPACE]}" --selector "llmlab-run=$NAME"
  else
    submit
  fi
}

parse_arguments "$@"
main
