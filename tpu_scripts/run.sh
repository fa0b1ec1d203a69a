#!/usr/bin/env bash
# Starts the training on all workers of a run.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

HELP="Usage: run.sh [--dry-run] [--SETTING VALUE ...] NAME FILE.py [flags of llmlab train ...]

Starts 'llmlab train FILE.py ...' on every worker of every slice, in the background: it outlives the connection.
Without --out the run goes to LLMLAB_BUCKET/NAME. The same command resumes at the last checkpoint. Where the same
command runs already, nothing happens.

    run.sh nano experiments/quickstart.py --optimizer.peak-lr 1e-3

Settings: PROJECT ZONE BUCKET
Next: logs.sh --follow NAME"

main() {
  require_name
  require_location
  require_experiment
  on_workers "$(start_command)"
}

parse_arguments "$@"
main
