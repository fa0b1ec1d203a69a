#!/usr/bin/env bash
# Keeps a run going on TPUs that can be taken away: create, set up, run, and again from the bucket after every loss.
#
#                      ABSENT --create--> WAITING_FOR_RESOURCES --> PROVISIONING --> ACTIVE --setup, run--> watch
#                        ^                        |                      |             |
#                        +--------delete----------+------ FAILED --------+     SUSPENDING --> SUSPENDED
#                        +--------delete-----------------------------------------------------------+
#
# A suspended resource is never queued again by Cloud TPU, so it is deleted and a new one of the same name is made.
# An ACTIVE resource with a node that is not READY is lost as well. The training resumes because its --out is the same.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: babysit.sh [--dry-run] [--delete-on-exit] [--spot|--reserved|--on-demand] [--SETTING VALUE ...]
                  NAME FILE.py [flags of llmlab train ...]

Creates the TPU of the run NAME where there is none, installs llmlab, starts 'llmlab train FILE.py ...' on all
workers, and watches. When the TPU is preempted, suspended or broken: deletes it, creates it again, and resumes from
the bucket. Ends with the training's exit code:

    0 done        1 failed        2 your input        (never retried)
    42 preempted after saving, or killed by a signal: started again

It gives up (1) when gcloud refuses the request (quota, permission), after LLMLAB_MAX_RESTARTS restarts without a new
checkpoint, and after LLMLAB_MAX_ERRORS polls in a row without an answer. Ctrl-C ends the watching: TPU and training
go on, and the same command takes them up again. With --delete-on-exit the TPU is deleted in every one of these cases.

Settings: those of create.sh, and BUCKET REPOSITORY REVISION SOURCE POLL_SECONDS MAX_RESTARTS MAX_ERRORS"
SWITCHES=(delete-on-exit)

SEEN=""          # the last state that was printed
LAUNCHED=0       # whether the job on the present TPU is known to be this one
WORKERS=0        # that started it
WAITS=1          # poll intervals until the next look; grows while nothing changes
ERRORS=0         # looks in a row that failed
NOT_READY=0      # looks in a row that found a node not READY
ENDING=0         # looks in a row that found some workers ended and others not
CONFIRMED=0      # whether a failure was seen twice
RESTARTS=0       # since the last new checkpoint
CHECKPOINT=-1    # its step
ANSWER=""        # what the workers printed
VERDICT=""       # what look_at_job made of it
WORST=0          # the exit code that counts

log() { printf '%(%T)T %s\n' -1 "$*" >&2; }

# Ends with exit code $1 and says what is left behind.
finish() {
  local code="$1"
  shift
  trap '' INT TERM
  log "$*"
  if on delete-on-exit && read_state && [[ $STATE != ABSENT && $OWNER == "$NAME" ]]; then
    delete_resource --quiet || report_what_exists
  else
    report_what_exists
  fi
  exit "$code"
}

interrupted() {
  [[ -z $SLEEPING ]] || kill "$SLEEPING" 2>/dev/null || true
  finish 130 "interrupted; the run is in $OUT, and the same command takes it up again"
}

# A look without an answer: rarer and rarer looks (up to 16 intervals), and an end.
count_error() {
  ERRORS=$((ERRORS + 1))
  if ((ERRORS >= CONFIG[MAX_ERRORS])); then
    finish 1 "giving up after $ERRORS errors in a row: $*"
  fi
  log "$* ($ERRORS of ${CONFIG[MAX_ERRORS]})"
  pause $((ERRORS < 5 ? 1 << (ERRORS - 1) : 16))
}

# The highest step under OUT/checkpoints, -1 where there is none.
newest_checkpoint() {
  { gcloud storage ls "${OUT%/}/checkpoints/" 2>/dev/null || true; } |
    awk -F/ 'BEGIN { best = -1 } $(NF - 1) ~ /^[0-9]+$/ && $(NF - 1) > best { best = $(NF - 1) } END { print best }'
}

count_restart() {
  local step
  step="$(newest_checkpoint)"
  if ((step > CHECKPOINT)); then
    RESTARTS=0 CHECKPOINT="$step"
  fi
  RESTARTS=$((RESTARTS + 1))
  if ((RESTARTS > CONFIG[MAX_RESTARTS])); then
    finish 1 "giving up: ${CONFIG[MAX_RESTARTS]} restarts without a checkpoint after step $CHECKPOINT"
  fi
  log "restart $RESTARTS of at most ${CONFIG[MAX_RESTARTS]} without progress (newest checkpoint: step $CHECKPOINT)"
}

# --- the job on the workers

# Runs a command on all workers and keeps what it prints; its llmlab-job lines are the answer.
ask_workers() { ANSWER="$(on_workers "$1")"; }

# The words after the host of every llmlab-job line.
answers() { sed -n 's/^llmlab-job [^ ]* //p' <<<"$ANSWER"; }

launch() {
  ask_workers "$(start_command)" || return
  WORKERS="$(answers | grep -c .)" || return
  LAUNCHED=1 ENDING=0 CONFIRMED=0
  log "training runs on $WORKERS workers; watch it: $(quoted "$SCRIPTS/logs.sh" "${LOCATION[@]}" --follow "$NAME")"
}

start_job() {
  { setup_workers && launch; } || {
    count_error "the workers could not be set up"
    return 1
  }
}

# The job runs already: an earlier babysit.sh or run.sh started it. Starting the same command changes nothing, and
# worker.sh answers 3 to another one.
take_up() {
  local status=0
  launch || status=$?
  if ((status == 3)); then
    finish 2 "another command runs under the name $NAME; delete it first, or choose another name"
  elif ((status)); then
    count_error "not all workers answer"
  fi
}

# New machines do not have worker.sh yet.
state_command() {
  printf 'if [ -f llmlab-worker.sh ]; then %s; else echo llmlab-job new absent; fi' \
    "$(quoted bash llmlab-worker.sh state "$NAME")"
}

# Sets VERDICT: running, ending, absent, done, unknown, or the exit code that counts.
look_at_job() {
  local status code total=0 running=0 absent=0 worst=0
  VERDICT=unknown
  ask_workers "$(state_command)" || return 0
  while read -r status code; do
    total=$((total + 1))
    case "$status" in
      running) running=$((running + 1)) ;;
      absent) absent=$((absent + 1)) ;;
      exited) worst="$(graver "$worst" "$code")" ;;
    esac
  done < <(answers)
  if ((total == 0 || (LAUNCHED && total < WORKERS))); then
    return 0 # a worker did not answer
  fi
  if ((absent)); then
    VERDICT=absent
  elif ((worst && running)); then
    VERDICT=ending
  elif ((running)); then
    VERDICT=running
  elif ((worst)); then
    VERDICT="$worst"
  else
    VERDICT="done"
  fi
  WORST="$worst"
}

# Of two exit codes the one that explains the other. One worker's preemption takes its peers down with any code, so 42
# comes first; the user's error is the same everywhere; a plain failure explains the peers that were killed.
graver() {
  local code
  for code in 42 130 2 1; do
    if (($1 == code || $2 == code)); then
      printf '%s' "$code"
      return
    fi
  done
  printf '%s' $(($1 > $2 ? $1 : $2))
}

# Starts the job again on the same machines.
relaunch() {
  log "$*"
  count_restart
  LAUNCHED=0
  ask_workers "$(quoted bash llmlab-worker.sh stop "$NAME")" || true
  start_job || true
}

# What to do with a job that has ended with exit code $1 on machines that are well.
settle() {
  case "$1" in
    42) relaunch "preempted after saving (42), and the TPU is still there" ;;
    130) finish 130 "the training was interrupted on a worker" ;;
    2) finish 2 "the training refused its input (exit code 2); fix it and run the same command again" ;;
    *)
      if (($1 >= 128)); then
        relaunch "the training was killed by signal $(($1 - 128))"
      elif ((!CONFIRMED)); then
        # A preempted peer can take a worker down before Cloud TPU knows of it: look at the machines once more.
        CONFIRMED=1
        pause
      else
        finish 1 "the training failed (exit code $1). Its log: $(quoted "$SCRIPTS/logs.sh" "${LOCATION[@]}" "$NAME")"
      fi
      ;;
  esac
}

# --- the machines

# Whether every node of every slice is READY. Fails with 2 where gcloud does not answer.
nodes_are_ready() {
  local states ready
  states="$(gcloud compute tpus tpu-vm list "${LOCATION[@]}" --filter "labels.llmlab_run=$NAME" \
    --format 'value(state)')" || return 2
  ready="$(grep -cx READY <<<"$states")" || true
  ! grep -qvx READY <<<"$states" && ((ready == CONFIG[SLICES]))
}

create() {
  local message attempt
  LAUNCHED=0 NOT_READY=0
  for attempt in 1 2 3; do
    if create_resource 2>&1 | tee "$SCRATCH/create" >&2; then
      return 0
    fi
    message="$(<"$SCRATCH/create")"
    case "$message" in
      *ALREADY_EXISTS*) return 0 ;; # an earlier request was accepted after all
      *UNAVAILABLE* | *INTERNAL* | *DEADLINE_EXCEEDED*) pause "$attempt" ;;
      *) break ;;
    esac
  done
  finish 1 "gcloud did not accept the request (its message is above)"
}

# Deletes what is left of a lost TPU; the next look finds ABSENT and creates it again.
replace() {
  log "$*: deleting it, to create it again and resume from $OUT"
  require_own
  count_restart
  LAUNCHED=0 NOT_READY=0
  delete_resource --quiet || count_error "the lost TPU could not be deleted"
}

handle_failure() {
  local message
  message="$(failure_message)" || message="(gcloud does not say why)"
  case "$message" in
    *[Qq]uota* | *PERMISSION_DENIED* | *[Pp]ermission* | *INVALID_ARGUMENT*)
      finish 1 "Cloud TPU refused the request: $message"
      ;;
  esac
  replace "the request failed ($message)"
}

tend_active() {
  local ready=0
  nodes_are_ready || ready=$?
  if ((ready == 2)); then
    count_error "gcloud does not list the nodes"
    return
  elif ((ready)); then
    NOT_READY=$((NOT_READY + 1))
    if ((NOT_READY > 1)); then # twice, because lists can lag behind
      replace "a node is not READY"
    else
      pause
    fi
    return
  fi
  NOT_READY=0
  look_at_job
  tend_job
}

tend_job() {
  if [[ $VERDICT == unknown ]]; then
    count_error "not all workers answer"
    return
  fi
  if ((!LAUNCHED)); then
    if [[ $VERDICT == running || $VERDICT == ending ]]; then
      take_up
    else # also after an earlier end: the same command resumes, or finds that all is done
      start_job || return 0
    fi
    pause
    return
  fi
  ERRORS=0
  case "$VERDICT" in
    running)
      ENDING=0 CONFIRMED=0
      pause
      ;;
    ending) # the others notice a lost peer within minutes; the last ones may be saving
      ENDING=$((ENDING + 1))
      if ((ENDING > 3)); then
        settle "$WORST"
      else
        pause
      fi
      ;;
    absent) relaunch "the job is gone from a worker" ;;
    done) finish 0 "the training is done: $OUT" ;;
    *) settle "$VERDICT" ;;
  esac
}

look() {
  if ! read_state; then
    count_error "gcloud does not describe $NAME"
    return
  fi
  if [[ $STATE != "$SEEN" ]]; then
    log "$NAME: $STATE"
    SEEN="$STATE" WAITS=1
  fi
  require_own
  case "$STATE" in
    ABSENT) create ;;
    WAITING_FOR_RESOURCES | PROVISIONING | ACCEPTED | CREATING | SUSPENDING | DELETING)
      LAUNCHED=0 ERRORS=0
      pause "$WAITS"
      WAITS=$((WAITS < 4 ? WAITS * 2 : 4))
      ;;
    ACTIVE) tend_active ;;
    FAILED) handle_failure ;;
    *) replace "it is $STATE" ;; # SUSPENDED, and whatever Cloud TPU may add
  esac
}

print_plan() {
  note "look:"
  queued_resources describe "$NAME" --format "$STATE_FORMAT"
  note "where there is none, ask for it and look again until it is ACTIVE:"
  create_resource
  note "ACTIVE: install, start, and look at the nodes and the job every ${CONFIG[POLL_SECONDS]} s:"
  setup_workers
  on_workers "$(start_command)"
  show gcloud compute tpus tpu-vm list "${LOCATION[@]}" --filter "labels.llmlab_run=$NAME" --format 'value(state)'
  on_workers "$(state_command)"
  note "SUSPENDED, FAILED, or a node not READY: delete, then from the top; the run resumes from $OUT:"
  show gcloud storage ls "${OUT%/}/checkpoints/"
  delete_resource --quiet
}

main() {
  require_name
  require_location
  require ACCELERATOR_TYPE RUNTIME_VERSION
  require_number SLICES MAX_RESTARTS MAX_ERRORS
  require_poll
  require_experiment
  if [[ $OUT != gs://* ]]; then
    usage_error "--out $(quoted "$OUT") is lost with the TPU; babysitting needs a bucket: --out gs://..."
  fi
  if dry_run; then
    print_plan
    return
  fi
  scratch
  trap interrupted INT TERM
  CHECKPOINT="$(newest_checkpoint)"
  while true; do
    look
  done
}

parse_arguments "$@"
main
