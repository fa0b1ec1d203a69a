#!/usr/bin/env bash
# Stands in for gcloud, kubectl, xpk, sky, sbatch, srun and scontrol: records its words, answers what the test scripted.
#
# $FAKE/calls            every call: tool and words, each followed by a NUL, then the record separator 0x1e and a NUL
# $FAKE/TOPIC/N          the N-th answer to calls of a topic; the last one stays. First line: exit code, or "hang".
#                        Second line: the message for stderr. Rest: stdout.
tool="${0##*/}"
printf '%s\0' "$tool" "$@" $'\x1e' >>"$FAKE/calls"
case "$tool $*" in
  "kubectl create "*) topic=kubectl && cat >"$FAKE/stdin" ;;
  *"queued-resources describe "*failedData*) topic=failure ;;
  *"queued-resources describe "*) topic=describe ;;
  *"queued-resources create "*) topic=create ;;
  *"queued-resources delete "*) topic=delete ;;
  *"queued-resources scp "*) topic=scp ;;
  *"queued-resources ssh "*" setup "*) topic=setup ;;
  *"queued-resources ssh "*" start "*) topic=start ;;
  *"queued-resources ssh "*" state "*) topic=state ;;
  *"queued-resources ssh "*" stop "*) topic=stop ;;
  *"queued-resources ssh "*) topic=ssh ;;
  *"tpu-vm list "*) topic=nodes ;;
  *"storage ls "*) topic=storage ;;
  *) topic="$tool" ;;
esac
[[ -d $FAKE/$topic ]] || exit 0
count=1
[[ ! -f $FAKE/$topic/count ]] || read -r count <"$FAKE/$topic/count"
answer="$FAKE/$topic/$count"
if [[ -f $FAKE/$topic/$((count + 1)) ]]; then
  echo "$((count + 1))" >"$FAKE/$topic/count"
fi
{
  read -r code
  read -r message
  [[ -z $message ]] || printf '%s\n' "$message" >&2
  cat
} <"$answer"
if [[ $code == hang ]]; then
  exec sleep 30
fi
exit "$code"
