#!/usr/bin/env bash
# Open MPI's mpirun, of whose ranks some may die (ULFM). Not submitted, but what jobs/sites/openmpi_mpirun.sh starts.
#
# It ends with 0 also when nobody is left, so the program leaves a mark when it has ended well. And it passes Slurm's
# signals on by its daemons on the nodes, which must not die of them (jobs/prted_deaf.sh).
own=$PWD/.marks-${SLURM_JOB_ID:-${PBS_JOBID:-0}}-$$
export MPILM_MARKS=${MPILM_MARKS:-$own} PRTE_MCA_prte_launch_agent=$PWD/jobs/prted_deaf.sh
mpirun --with-ft ulfm -x MPILM_MARKS "$@"
code=$?
if [ "$code" = 0 ] && ! grep -qsx ended "$MPILM_MARKS"; then
    echo "mpirun ended with 0, but no rank came to the end: see above. The same command goes on." >&2
    code=1
fi
rm -f "$own"
exit "$code"
