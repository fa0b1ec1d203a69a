#!/usr/bin/env bash
# Deletes the TPU of a run. What the run has saved in the bucket stays.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: delete.sh [--dry-run] [--yes] [--SETTING VALUE ...] NAME

Deletes the queued resource NAME and its nodes, after gcloud has asked; --yes skips the question. Refuses a resource
that does not carry the label llmlab_run=NAME, which create.sh gives. The bucket is never touched.

Settings: PROJECT ZONE"
SWITCHES=(yes)

main() {
  local -a quiet=()
  require_name
  require_location
  if on yes; then
    quiet=(--quiet)
  fi
  if dry_run; then
    queued_resources describe "$NAME" --format "$STATE_FORMAT"
    note "only where its label is llmlab_run=$NAME:"
  else
    read_state || fail "gcloud could not describe $NAME; nothing was deleted"
    require_own
    if [[ $STATE == ABSENT ]]; then
      say "there is no queued resource $NAME: nothing to delete"
      return
    fi
  fi
  delete_resource "${quiet[@]}"
}

parse_arguments "$@"
main
