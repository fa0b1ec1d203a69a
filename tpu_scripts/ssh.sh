#!/usr/bin/env bash
# Opens a shell on a worker of a run, or runs one command there.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: ssh.sh [--dry-run] [--worker N|all] [--slice N|all] [--SETTING VALUE ...] NAME [COMMAND ...]

A shell on worker 0 of slice 0, or COMMAND there, its words passed exactly as they are. 'all' needs a command.

    ssh.sh nano
    ssh.sh --worker all --slice all nano df -h

Settings: PROJECT ZONE"
OPTIONS=(worker slice)

main() {
  local -a command=()
  require_name
  require_location
  if ((${#REST[@]})); then
    command=(--command "$(quoted "${REST[@]}")")
  elif [[ ${OPTION[worker]:-0}${OPTION[slice]:-0} == *all* ]]; then
    usage_error "a shell opens on one worker; give a command to run on all, or --worker N --slice N"
  fi
  queued_resources ssh "$NAME" --node "${OPTION[slice]:-0}" --worker "${OPTION[worker]:-0}" "${command[@]}"
}

parse_arguments "$@"
main
