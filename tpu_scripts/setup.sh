#!/usr/bin/env bash
# Brings the code to all workers of a run and installs it there.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: setup.sh [--dry-run] [--SETTING VALUE ...] NAME

Installs llmlab on every worker of every slice: a clone of LLMLAB_REPOSITORY at LLMLAB_REVISION or, where that is
empty, a copy of the working directory (what git tracks or would track, with local changes). Again after a change of
the code: the copy is replaced, the environment is kept. A running job is left alone, with an error.

Settings: PROJECT ZONE REPOSITORY REVISION SOURCE"

main() {
  require_name
  require_location
  setup_workers
}

parse_arguments "$@"
main
