#!/usr/bin/env bash
# Asks for the TPU of a run: a queued resource that carries the run's name.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: create.sh [--dry-run] [--wait] [--spot|--reserved|--on-demand] [--SETTING VALUE ...] NAME

Asks Cloud TPU for the machines of the run NAME, as a queued resource of that name. Returns once the request is in
the queue; with --wait, once the TPU is ACTIVE. LLMLAB_SLICES above 1 asks for several slices.

Settings: PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION PROVISIONING SLICES NETWORK SUBNETWORK SERVICE_ACCOUNT
(in tpu_scripts/env as LLMLAB_ZONE=..., or here as --zone ...)

Next: setup.sh NAME and run.sh NAME FILE.py, or babysit.sh NAME FILE.py, which does all of it."
SWITCHES=(wait)

interrupted() {
  trap '' INT TERM
  [[ -z $SLEEPING ]] || kill "$SLEEPING" 2>/dev/null || true
  say ""
  say "interrupted"
  report_what_exists
  exit 130
}

# Until the TPU is ACTIVE: 0; FAILED or SUSPENDED: an error. The queue can take hours, so polls grow rarer.
wait_until_active() {
  local times=1 errors=0 before=""
  while true; do
    if ! read_state; then
      errors=$((errors + 1))
      ((errors < CONFIG[MAX_ERRORS])) || fail "gcloud failed $errors times in a row"
    else
      errors=0
      case "$STATE" in
        ACTIVE) return 0 ;;
        FAILED) fail "the request failed: $(failure_message). It stays in the queue until deleted: $(delete_hint)" ;;
        ABSENT | SUSPENDING | SUSPENDED) fail "the queued resource $NAME is $STATE; create it again" ;;
      esac
      if [[ $STATE != "$before" ]]; then
        say "$NAME: $STATE"
        times=1 before="$STATE"
      fi
    fi
    pause "$times"
    times=$((times < 4 ? times * 2 : 4))
  done
}

main() {
  require_name
  require_location
  require ACCELERATOR_TYPE RUNTIME_VERSION
  require_number SLICES MAX_ERRORS
  require_poll
  dry_run || trap interrupted INT TERM
  create_resource || fail "gcloud did not accept the request (its message is above); nothing was created"
  if on wait; then
    note "then, until it is ACTIVE:"
    if dry_run; then
      queued_resources describe "$NAME" --format "$STATE_FORMAT"
    else
      wait_until_active
      say "$NAME: ACTIVE"
    fi
  fi
}

parse_arguments "$@"
main
