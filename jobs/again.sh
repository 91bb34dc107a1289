#!/usr/bin/env bash
# Starts a training again after ranks have died, in the same allocation, for as long as it gets further:
#
#     jobs/again.sh mpirun -np 8 python -m mpilm.train --run.dir runs/x ...
#
# Not submitted, but what the batch scripts start. It helps where a rank that is killed ends the job (srun, MPICH,
# anything without ULFM), and where ULFM can't go on.
#
# The last word have 0, 2 ("to be put right"), 75 ("saved, submit me again"), and any end after a signal to this script,
# as Ctrl-C is. After all else (a rank was killed, it hung, too few are left, a bug) the same command is started again
# if it had completed a checkpoint since it was started, and up to twice if it did not get as far as its first word: a
# node may come back. If it is not started again, its exit code is that of this script; or 75 where an earlier start had
# completed a checkpoint: elsewhere it may go on. Launchers end with 0 also when no rank could be started or none is
# left; without the program's own word that counts as 1.
set -uo pipefail
export MPILM_MARKS=$PWD/.marks-${SLURM_JOB_ID:-${PBS_JOBID:-0}}-$$
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || rm -f "$PWD/.marks-$SLURM_JOB_ID-"* # of starts whose node went down
if ! : >"$MPILM_MARKS"; then # the program leaves its marks there: started, saved, ended
    echo "$0: call it in a folder that may be written to, and that the node of rank 0 sees." >&2
    exit 2
fi
pause_s=${MPILM_PAUSE_S:-10} # before a launcher that failed has another try
trap 'rm -f "$MPILM_MARKS"' EXIT
trap 'told=yes' HUP INT TERM USR1
told='' saved='' tries=0

marked() {
    grep -qsx "$1" "$MPILM_MARKS"
}

say() {
    echo "$0: exit code $code, and $*" >&2
}

while true; do
    : >"$MPILM_MARKS"
    code=0
    "$@" || code=$?
    [ "$code" != 0 ] || marked ended || code=1
    case "$code" in 0 | 2 | 75 | 126 | 127) exit "$code" ;; esac
    [ -z "$told" ] || exit "$code"
    if marked saved; then
        say "a checkpoint was saved since it was started: it is started again"
        saved=yes tries=0
    elif ! marked started && [ "$((tries += 1))" -le 2 ]; then
        say "it did not get as far as its first word: it is started again in $pause_s s"
        sleep "$pause_s"
    elif [ -n "$saved" ]; then
        say "nothing was saved since it was started again: exit code 75"
        exit 75
    else
        exit "$code"
    fi
done
