#!/usr/bin/env bash
# The part of the launching scripts that runs on a worker. setup.sh copies it there as llmlab-worker.sh.
#
# A job is a directory llmlab-jobs/NAME in the worker's home:
#
#   command     the command line, as a shell reads it
#   log         what it has printed, of all its starts
#   lock        held (flock) by the job's processes as long as one of them lives; a reboot frees it
#   pid         of the command
#   exit-code   written when the command ends; missing where it was killed from outside
set -euo pipefail

HELP="Usage: worker.sh [--dry-run] VERB ...

    setup clone URL REVISION      install llmlab from a git repository
    setup upload ARCHIVE          install llmlab from an uploaded archive
    start NAME COMMAND ...        start a command in the background, unless it runs
    state NAME                    print 'llmlab-job HOST running', '... exited CODE' or '... absent'
    stop NAME                     ask it to save and end (SIGTERM); after 90 seconds, end it (SIGKILL)
    logs NAME LINES once|follow   print its output

A command's --out gs://BUCKET/PATH becomes llmlab-buckets/BUCKET/PATH, where the bucket is mounted (gcsfuse) before the
command starts: a run is written to a directory that all workers see.

Works in the home directory of the worker it is copied to."

DRY_RUN=0

run() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    printf '\n'
    return 0
  fi
  "$@"
}

job_directory() {
  if [[ ! $1 =~ ^[a-z][a-z0-9-]*$ ]]; then
    printf 'error: %q is not a run name (a-z, 0-9 and -)\n' "$1" >&2
    exit 2
  fi
  JOB="llmlab-jobs/$1"
}

is_running() { [[ -e $1/lock ]] && ! flock --nonblock "$1/lock" true; }

report() { printf 'llmlab-job %s %s\n' "$(uname -n)" "$*"; }

# llmlab needs Python 3.11; the images of some TPU generations ship an older one, so fetch one where none is found.
make_environment() {
  local version
  if [[ -x llmlab-venv/bin/python ]]; then
    return 0
  fi
  for version in 3.13 3.12 3.11; do
    if command -v "python$version" >/dev/null && "python$version" -c 'import ensurepip' 2>/dev/null; then
      run "python$version" -m venv llmlab-venv
      return 0
    fi
  done
  run python3 -m pip install --user --quiet uv
  run python3 -m uv venv --quiet --seed --python 3.12 llmlab-venv
}

fetch_code() {
  case "$1" in
    clone)
      if [[ -d llmlab/.git ]]; then
        run git -C llmlab fetch --quiet --tags "$2" "$3"
        run git -C llmlab checkout --quiet --force FETCH_HEAD
      else
        run rm -rf -- llmlab
        run git clone --quiet -- "$2" llmlab
        run git -C llmlab checkout --quiet "$3" --
      fi
      ;;
    upload)
      run rm -rf -- llmlab.new
      run mkdir llmlab.new
      run tar -C llmlab.new -xzf "$2"
      run rm -rf -- llmlab
      run mv llmlab.new llmlab
      ;;
    *)
      printf 'error: setup takes clone or upload, not %q\n' "$1" >&2
      exit 2
      ;;
  esac
}

setup() {
  local job
  for job in llmlab-jobs/*; do
    if is_running "$job"; then
      printf 'error: %s runs on %s: its code is not replaced under it\n' "$job" "$(uname -n)" >&2
      exit 3
    fi
  done
  fetch_code "$@"
  make_environment
  run llmlab-venv/bin/pip install --quiet -c llmlab/constraints.txt -e 'llmlab[tpu]'
}

start() {
  local command
  job_directory "$1"
  shift
  command="$(printf '%q ' "$@")"
  if is_running "$JOB"; then
    if [[ "$(<"$JOB/command")" != "$command" ]]; then
      printf 'error: another command runs on %s: %s\n' "$(uname -n)" "$(<"$JOB/command")" >&2
      exit 3
    fi
    report running
    return
  fi
  if ((DRY_RUN)); then
    printf '%s\n' "$command"
    return
  fi
  mkdir -p "$JOB"
  printf '%s\n' "$command" >"$JOB/command"
  rm -f -- "$JOB/exit-code" "$JOB/pid"
  # The lock is taken here and inherited, so whoever asks after this line sees a running job. setsid: the end of the
  # ssh session does not reach it.
  exec 9>"$JOB/lock"
  flock --nonblock 9
  setsid bash "${BASH_SOURCE[0]}" supervise "${JOB##*/}" "$@" </dev/null >>"$JOB/log" 2>&1 &
  report started
}

# Mounts a bucket at llmlab-buckets/NAME. No metadata is cached, not even that a file is missing: workers see each
# other's files at once.
mount_bucket() {
  local place="$PWD/llmlab-buckets/$1"
  if mountpoint --quiet "$place"; then
    return 0
  fi
  if ! command -v gcsfuse >/dev/null && ! sudo apt-get install --yes --quiet gcsfuse; then
    printf 'error: gcsfuse is not installed on %s, and gs://%s cannot be mounted without it; install it as its ' \
      "$(uname -n)" "$1" >&2
    printf 'documentation says (Cloud Storage FUSE), then run setup.sh again\n' >&2
    return 1
  fi
  mkdir -p "$place"
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 "$1" "$place"
}

# Sets COMMAND to the words with a bucket in --out mounted and replaced by its directory.
mount_out() {
  local word before="" address
  COMMAND=()
  for word in "$@"; do
    address="$word"
    if [[ $word == --out=* ]]; then
      before="--out"
      address="${word#--out=}"
    fi
    if [[ $before == --out && $address == gs://?* ]]; then
      address="${address#gs://}"
      mount_bucket "${address%%/*}" || return 1
      word="${word%gs://*}$PWD/llmlab-buckets/$address"
    fi
    COMMAND+=("$word")
    before="$word"
  done
}

# Runs the command and keeps its exit code.
supervise() {
  local child code=0
  job_directory "$1"
  shift
  # The shutdown of a preempted machine sends SIGTERM to every process, so to the command as well. It is survived here
  # to keep the exit code, and not passed on: to llmlab a second signal means "at once, without saving".
  trap : TERM
  export PATH="$PWD/llmlab-venv/bin:$PATH"
  printf '\n--- %s: %s\n' "$(date -u +%FT%TZ)" "$(<"$JOB/command")"
  if ! mount_out "$@"; then
    printf '1\n' >"$JOB/exit-code"
    return 0
  fi
  (cd llmlab && exec "${COMMAND[@]}") &
  child=$!
  printf '%s\n' "$child" >"$JOB/pid"
  while kill -0 "$child" 2>/dev/null; do # wait returns early when a signal comes
    wait "$child" || true
  done
  wait "$child" || code=$?
  printf '%s\n' "$code" >"$JOB/exit-code.new"
  mv "$JOB/exit-code.new" "$JOB/exit-code"
  printf -- '--- %s: exit code %s\n' "$(date -u +%FT%TZ)" "$code"
}

state() {
  job_directory "$1"
  if is_running "$JOB"; then
    report running
  elif [[ -s $JOB/exit-code ]]; then
    report exited "$(<"$JOB/exit-code")"
  elif [[ -e $JOB/lock ]]; then
    report exited 137 # no code was left behind: killed, or the machine went down
  else
    report absent
  fi
}

stop() {
  local tenths
  job_directory "$1"
  if is_running "$JOB" && [[ -s $JOB/pid ]]; then
    run kill -TERM "$(<"$JOB/pid")" || true
    for ((tenths = 0; tenths < 900 && DRY_RUN == 0; tenths++)); do
      if ! is_running "$JOB"; then
        break
      fi
      sleep 0.1
    done
    if is_running "$JOB"; then
      run kill -KILL "$(<"$JOB/pid")" || true
    fi
  fi
  state "$1"
}

logs() {
  job_directory "$1"
  if [[ $3 == follow ]]; then
    run tail -n "$2" -F "$JOB/log"
  else
    run tail -n "$2" "$JOB/log"
  fi
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
verb="${1:---help}"
shift || true
case "$verb" in
  -h | --help) printf '%s\n' "$HELP" ;;
  setup | start | supervise | state | stop | logs) "$verb" "$@" ;;
  *)
    printf 'error: there is no verb %q; see --help\n' "$verb" >&2
    exit 2
    ;;
esac
