# shellcheck shell=bash
# What every launching script shares: settings, arguments, quoting, dry runs, and the queued resource of a run.
#
# A script sources this file, sets HELP (its --help), SWITCHES (its flags without a value), OPTIONS (its flags with
# one), calls parse_arguments "$@", and then reads
#
#   NAME       the run's name, which is also the name of everything in the cloud that belongs to it
#   REST       what follows the name: the experiment file and its flags, never touched
#   CONFIG     the settings of env.example, without their prefix: "${CONFIG[ZONE]}"
#   on wait    whether the switch --wait was given;  "${OPTION[lines]}": the value of --lines
#
# Commands that change something go through run_command, which prints them, and under --dry-run does nothing else.
# Exit codes are llmlab's: 0 done, 1 failed, 2 the user's error, 130 interrupted.

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  printf 'error: bash %s is too old, these scripts need 4.4 or later (macOS: brew install bash)\n' "$BASH_VERSION" >&2
  exit 2
fi

SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$SCRIPTS")"

declare -A CONFIG=(
  [PROJECT]="" [ZONE]="" [ACCELERATOR_TYPE]="" [RUNTIME_VERSION]="" [PROVISIONING]=on-demand [SLICES]=1
  [NETWORK]="" [SUBNETWORK]="" [SERVICE_ACCOUNT]="" [BUCKET]="" [REPOSITORY]="" [REVISION]=main [SOURCE]="$ROOT"
  [POLL_SECONDS]=60 [MAX_RESTARTS]=10 [MAX_ERRORS]=10
  [CLUSTER]="" [IMAGE]="" [NAMESPACE]=default [GKE_ACCELERATOR]=tpu-v6e-slice [GKE_TOPOLOGY]=4x4
  [GKE_CHIPS_PER_HOST]=4 [GKE_SERVICE_ACCOUNT]="" [GRACE_SECONDS]=120 [XPK_STORAGE]=""
  [SKY_ACCELERATORS]=tpu-v6e-16 [SKY_NODES]=1 [SKY_TASK]=""
  [SLURM_PARTITION]="" [SLURM_ACCOUNT]="" [SLURM_NODES]=1 [SLURM_GPUS_PER_NODE]=8 [SLURM_CPUS_PER_TASK]=8
  [SLURM_TIME]=24:00:00 [SLURM_LOGS]=slurm-logs
)
declare -A ON=() OPTION=()
declare -a SWITCHES=() OPTIONS=() REST=() LOCATION=()
HELP=""
NAME=""
DRY_RUN=0
STATE=""
OWNER=""
OUT=""
BUCKET_NAME=""
SCRATCH=""

# Where containers and SkyPilot's machines see buckets, each below its name (worker.sh: below its home).
MOUNTS=/llmlab-buckets
# What gcsfuse caches about files of a bucket that several machines write: nothing, so all see the same at once.
# shellcheck disable=SC2034 # read by gke.sh and xpk.sh
MOUNT_OPTIONS=implicit-dirs,metadata-cache:ttl-secs:0

# --- messages

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

usage_error() {
  say "error: $*"
  exit 2
}

# --- quoting and running

# The words as one line that a shell reads back as exactly these words. Single quotes rather than printf %q: they
# mean the same to every shell, also across line breaks, and a path with a space stays readable.
quoted() {
  local word line="" end="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//"'"/"$end"}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

dry_run() { ((DRY_RUN)); }

# Prints a command: as the output of a dry run, else as a trace.
show() {
  if dry_run; then
    printf '%s\n' "$(quoted "$@")"
  else
    say "+ $(quoted "$@")"
  fi
}

# A remark between the commands of a dry run.
note() {
  if dry_run; then
    printf '# %s\n' "$*"
  fi
}

run_command() {
  show "$@"
  if dry_run; then
    return 0
  fi
  "$@"
}

on() { [[ -n ${ON[$1]:-} ]]; }

# A directory for this script's temporary files, made when first needed and removed at the end.
scratch() {
  if [[ -z $SCRATCH ]]; then
    SCRATCH="$(mktemp -d)"
    trap 'rm -rf -- "$SCRATCH"' EXIT
  fi
}

# Sleeps $1 poll intervals. In the background, because bash runs a trap only after the foreground command has ended.
pause() {
  local left="${1:-1}"
  for ((; left > 0; left--)); do
    sleep "${CONFIG[POLL_SECONDS]}" &
    SLEEPING=$!
    wait "$SLEEPING" || true
    SLEEPING=""
  done
}
SLEEPING=""

# --- settings and arguments

known() {
  local item wanted="$1"
  shift
  for item in "$@"; do
    if [[ $item == "$wanted" ]]; then
      return 0
    fi
  done
  return 1
}

setting_names() { printf '%s\n' "${!CONFIG[@]}" | sort | sed 's/^/LLMLAB_/' | tr '\n' ' '; }

# Reads LLMLAB_KEY=value lines as text. Not sourced: a settings file is data, and a $ in it is a $.
read_env_file() {
  local file="$1" line key value number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then
      continue
    fi
    if [[ ! $line =~ ^[[:space:]]*LLMLAB_([A-Z_]+)=(.*)$ ]]; then
      usage_error "$file:$number: '$line' is not LLMLAB_KEY=value"
    fi
    key="${BASH_REMATCH[1]}" value="${BASH_REMATCH[2]}"
    if [[ -z ${CONFIG[$key]+known} ]]; then
      usage_error "$file:$number: there is no setting LLMLAB_$key; there are $(setting_names)"
    fi
    if [[ $value =~ ^\"(.*)\"[[:space:]]*$ || $value =~ ^\'(.*)\'[[:space:]]*$ ]]; then
      value="${BASH_REMATCH[1]}"
    elif [[ $value =~ ^(.*[^[:space:]])?[[:space:]]+(#.*)?$ ]]; then
      value="${BASH_REMATCH[1]}"
    fi
    CONFIG[$key]="$value"
  done <"$file"
}

load_settings() {
  local file="${LLMLAB_ENV_FILE:-}" key variable
  if [[ -n $file && ! -f $file ]]; then
    usage_error "there is no settings file $file; copy $SCRIPTS/env.example to it"
  fi
  file="${file:-$SCRIPTS/env}"
  if [[ -f $file ]]; then
    read_env_file "$file"
  fi
  for key in "${!CONFIG[@]}"; do
    variable="LLMLAB_$key"
    if [[ -n ${!variable+set} ]]; then
      CONFIG[$key]="${!variable}"
    fi
  done
}

# parse_arguments "$@": one name, then (for the scripts that run something) the experiment file and its flags.
# Everything after the second word without dashes, or after --, belongs to the experiment and is passed on as it is.
parse_arguments() {
  local flag key
  load_settings
  while (($#)); do
    flag="$1"
    key="${flag#--}"
    key="${key//-/_}"
    key="${key^^}"
    case "$flag" in
      -h | --help)
        printf '%s\n' "$HELP"
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --spot | --reserved | --on-demand) CONFIG[PROVISIONING]="${flag#--}" ;;
      --)
        shift
        REST+=("$@")
        break
        ;;
      --*)
        if known "${flag#--}" "${SWITCHES[@]}"; then
          ON[${flag#--}]=1
        elif (($# < 2)); then
          usage_error "$flag is unknown here or lacks its value; see ${0##*/} --help"
        elif known "${flag#--}" "${OPTIONS[@]}"; then
          # shellcheck disable=SC2034 # read by the scripts that name OPTIONS
          OPTION[${flag#--}]="$2"
          shift
        elif [[ -n ${CONFIG[$key]+known} ]]; then
          CONFIG[$key]="$2"
          shift
        else
          usage_error "there is no flag $flag; see ${0##*/} --help. Flags of the experiment come after its file"
        fi
        ;;
      *)
        if [[ -z $NAME ]]; then
          NAME="$flag"
        else
          REST+=("$@")
          break
        fi
        ;;
    esac
    shift
  done
}

# Cloud names allow a-z, 0-9 and -; 40 characters leave room for the suffixes of nodes and pods in their limit of 63.
require_name() {
  local try
  if [[ -z $NAME ]]; then
    usage_error "give the run's name; see ${0##*/} --help"
  fi
  if [[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]]; then
    return 0
  fi
  try="$(printf '%s' "$NAME" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-')"
  while [[ $try =~ ^[^a-z] ]]; do
    try="${try:1}"
  done
  try="${try:0:40}"
  try="${try%%-}"
  usage_error "the run's name $(quoted "$NAME") also names cloud resources, which allow a-z, 0-9 and - (a letter" \
    "first, no - at the end, at most 40 characters); try ${try:-run-1}"
}

# require KEY...: settings that this script cannot do without.
require() {
  local key flag
  for key in "$@"; do
    if [[ -z ${CONFIG[$key]} ]]; then
      flag="${key//_/-}"
      usage_error "LLMLAB_$key is not set; put it into $SCRIPTS/env (from env.example) or pass --${flag,,}"
    fi
  done
}

# require_number KEY...: settings that are whole numbers.
require_number() {
  local key
  for key in "$@"; do
    if [[ ! ${CONFIG[$key]} =~ ^[0-9]+$ ]]; then
      usage_error "LLMLAB_$key=${CONFIG[$key]} is not a whole number"
    fi
  done
}

require_poll() {
  if [[ ! ${CONFIG[POLL_SECONDS]} =~ ^[0-9]*\.?[0-9]+$ ]]; then
    usage_error "LLMLAB_POLL_SECONDS=${CONFIG[POLL_SECONDS]} is not a number of seconds"
  fi
}

# Completes REST to the arguments of `llmlab train` and sets OUT. Without --out the run goes to BUCKET/NAME.
require_experiment() {
  local index
  if ((${#REST[@]} == 0)); then
    usage_error "give the experiment file after the run's name; see ${0##*/} --help"
  fi
  if [[ ${REST[0]} != *.py || ${REST[0]} == /* ]]; then
    usage_error "$(quoted "${REST[0]}") is not an experiment file; give its path from the top of the repository," \
      "as the workers see it: experiments/quickstart.py"
  fi
  for ((index = 1; index < ${#REST[@]}; index++)); do
    case "${REST[index]}" in
      --out) OUT="${REST[index + 1]:-}" ;;
      --out=*) OUT="${REST[index]#--out=}" ;;
    esac
  done
  if [[ -z $OUT ]]; then
    if [[ -z ${CONFIG[BUCKET]} ]]; then
      usage_error "the run needs a place that all workers share: set LLMLAB_BUCKET=gs://... or pass --out gs://..."
    fi
    OUT="${CONFIG[BUCKET]%/}/$NAME"
    REST+=(--out "$OUT")
  fi
}

# Sets BUCKET_NAME to the bucket of an address gs://BUCKET/PATH.
read_bucket_name() {
  BUCKET_NAME="${1#gs://}"
  BUCKET_NAME="${BUCKET_NAME%%/*}"
  if [[ $1 != gs://* || ! $BUCKET_NAME =~ ^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$ ]]; then
    usage_error "$(quoted "$1") is not a place in a Cloud Storage bucket: gs://BUCKET/PATH, the bucket's name made of" \
      "a-z, 0-9, - _ and ."
  fi
}

# For schedulers that mount the bucket: where OUT is an address, sets BUCKET_NAME and replaces the address in REST by
# its directory below MOUNTS. A plain directory is the user's own mount and stays.
mount_out() {
  local index address="$OUT"
  if [[ $address != *://* ]]; then
    return 0
  fi
  read_bucket_name "$address"
  OUT="$MOUNTS/${address#gs://}"
  for index in "${!REST[@]}"; do
    if [[ ${REST[index]} == "--out=$address" ]]; then
      REST[index]="--out=$OUT"
    elif ((index)) && [[ ${REST[index - 1]} == --out && ${REST[index]} == "$address" ]]; then
      REST[index]="$OUT"
    fi
  done
}

# --- the queued resource that carries the run's name

require_location() {
  require ZONE
  LOCATION=(--zone "${CONFIG[ZONE]}")
  if [[ -n ${CONFIG[PROJECT]} ]]; then
    LOCATION+=(--project "${CONFIG[PROJECT]}")
  fi
}

queued_resources() { run_command gcloud compute tpus queued-resources "$@" "${LOCATION[@]}"; }

# gcloud's own words for the state; the label tells whose it is.
STATE_FORMAT='value(state.state,tpu.nodeSpec[0].node.labels.llmlab_run)'

# Sets STATE (ABSENT where there is none) and OWNER (the label, empty where it has none). Fails where gcloud fails.
read_state() {
  local output
  scratch
  STATE="" OWNER=""
  if output="$(gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}" --format "$STATE_FORMAT" \
    2>"$SCRATCH/describe")"; then
    IFS=$'\t' read -r STATE OWNER <<<"$output" || true
  elif grep -q NOT_FOUND "$SCRATCH/describe"; then
    STATE=ABSENT
  else
    cat "$SCRATCH/describe" >&2
    return 1
  fi
}

# Refuses to go on with a resource that merely has the run's name: it was not made by create.sh, or for another run.
require_own() {
  if [[ $STATE != ABSENT && $OWNER != "$NAME" ]]; then
    usage_error "the queued resource $NAME carries the label llmlab_run=${OWNER:-(none)}, not llmlab_run=$NAME: it is" \
      "not this run's. Choose another run name, or delete it yourself with gcloud"
  fi
}

create_resource() {
  local -a flags=(--accelerator-type "${CONFIG[ACCELERATOR_TYPE]}" --runtime-version "${CONFIG[RUNTIME_VERSION]}")
  if ((CONFIG[SLICES] > 1)); then
    flags+=(--node-count "${CONFIG[SLICES]}" --node-prefix "$NAME")
  else
    flags+=(--node-id "$NAME")
  fi
  case "${CONFIG[PROVISIONING]}" in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
    on-demand) ;;
    *) usage_error "LLMLAB_PROVISIONING=${CONFIG[PROVISIONING]} must be spot, reserved or on-demand" ;;
  esac
  [[ -z ${CONFIG[NETWORK]} ]] || flags+=(--network "${CONFIG[NETWORK]}")
  [[ -z ${CONFIG[SUBNETWORK]} ]] || flags+=(--subnetwork "${CONFIG[SUBNETWORK]}")
  [[ -z ${CONFIG[SERVICE_ACCOUNT]} ]] || flags+=(--service-account "${CONFIG[SERVICE_ACCOUNT]}")
  queued_resources create "$NAME" "${flags[@]}" --labels "llmlab_run=$NAME"
}

# --force: the nodes go first, then the resource. --quiet: whoever calls this has decided already.
delete_resource() { queued_resources delete "$NAME" "$@" --force; }

# Why a resource FAILED, in gcloud's words.
failure_message() {
  gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}" \
    --format 'value(state.failedData.error.message)'
}

delete_hint() { quoted "$SCRIPTS/delete.sh" "${LOCATION[@]}" "$NAME"; }

# What exists now and how to be rid of it, for whoever has pressed Ctrl-C.
report_what_exists() {
  if ! read_state; then
    say "gcloud does not answer: the queued resource $NAME may exist. Look: $(quoted "$SCRIPTS/status.sh" "$NAME")"
  elif [[ $STATE == ABSENT ]]; then
    say "there is no queued resource $NAME: nothing runs, nothing costs."
  else
    say "the queued resource $NAME exists ($STATE) and is kept. To delete it: $(delete_hint)"
  fi
}

# Runs a command line on all workers of all slices. gcloud joins its words with spaces and the worker's shell splits
# them again, so it must be quoted once more: on_workers "$(quoted ...)".
on_workers() { queued_resources ssh "$NAME" --node all --worker all --command "$1"; }

# Copies a file into the home of every worker under the name $2.
copy_to_workers() { queued_resources scp "$1" "$NAME:$2" --node all --worker all; }

# The command that starts the run on a worker; worker.sh lies in its home since setup.
start_command() { quoted bash llmlab-worker.sh start "$NAME" llmlab train "${REST[@]}"; }

# The files of SOURCE that git tracks or would track, with local changes, as a gzipped archive at $1.
pack_source() {
  local file
  git -C "${CONFIG[SOURCE]}" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      if [[ -e ${CONFIG[SOURCE]}/$file ]]; then # a file deleted but still tracked has nothing to send
        printf './%s\0' "$file"
      fi
    done | tar -C "${CONFIG[SOURCE]}" --null -T - -czf "$1"
}

setup_workers() {
  local archive="llmlab-upload.tar.gz"
  copy_to_workers "$SCRIPTS/worker.sh" llmlab-worker.sh || return
  if [[ -n ${CONFIG[REPOSITORY]} ]]; then
    on_workers "$(quoted bash llmlab-worker.sh setup clone "${CONFIG[REPOSITORY]}" "${CONFIG[REVISION]}")"
    return
  fi
  if ! dry_run; then
    scratch
    archive="$SCRATCH/$archive"
    pack_source "$archive" || return
  else
    note "an archive of ${CONFIG[SOURCE]}, as git lists it:"
  fi
  copy_to_workers "$archive" llmlab-upload.tar.gz || return
  on_workers "$(quoted bash llmlab-worker.sh setup upload llmlab-upload.tar.gz)"
}

# --- Kubernetes

# A $ that Kubernetes leaves alone: in a container's command it reads $(NAME) as a variable and $$ as $.
double_dollars() { printf '%s' "${1//\$/\$\$}"; }
