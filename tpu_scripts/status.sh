#!/usr/bin/env bash
# What exists in the cloud for a run, and what its job does on every worker.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: status.sh [--dry-run] [--SETTING VALUE ...] [NAME]

Prints the state of the run's queued resource, of its nodes, and (where it is ACTIVE) of its job on every worker:
running, exited CODE, or absent. Without a name: every queued resource that these scripts made in the zone.

Settings: PROJECT ZONE"

main() {
  require_location
  if [[ -z $NAME ]]; then
    queued_resources list --filter 'tpu.nodeSpec[0].node.labels.llmlab_run:*'
    return
  fi
  require_name
  if dry_run; then
    queued_resources describe "$NAME" --format "$STATE_FORMAT"
  else
    read_state || fail "gcloud could not describe $NAME"
    printf '%s: %s\n' "$NAME" "$STATE"
    if [[ $STATE == FAILED ]]; then
      printf '%s\n' "$(failure_message)"
    fi
  fi
  note "where it is ACTIVE:"
  if dry_run || [[ $STATE == ACTIVE ]]; then
    run_command gcloud compute tpus tpu-vm list "${LOCATION[@]}" --filter "labels.llmlab_run=$NAME"
    on_workers "$(quoted bash llmlab-worker.sh state "$NAME")"
  fi
}

parse_arguments "$@"
main
