#!/usr/bin/env bash
# Shows what a run has printed on one of its workers.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: logs.sh [--dry-run] [--follow] [--lines N] [--worker N|all] [--slice N|all] [--SETTING VALUE ...] NAME

The last lines (100) of the run's log on worker 0 of slice 0; --follow keeps printing, until Ctrl-C, which stops the
printing and not the run.

Settings: PROJECT ZONE"
SWITCHES=(follow)
OPTIONS=(lines worker slice)

main() {
  local mode=once
  require_name
  require_location
  if on follow; then
    mode=follow
  fi
  queued_resources ssh "$NAME" --node "${OPTION[slice]:-0}" --worker "${OPTION[worker]:-0}" \
    --command "$(quoted bash llmlab-worker.sh logs "$NAME" "${OPTION[lines]:-100}" "$mode")"
}

parse_arguments "$@"
main
