# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# Open MPI 5 or newer, started by its own mpirun: a rank that is killed does not end the job, the others go on (ULFM).
#
#     MPILM_SITE=openmpi_mpirun sbatch jobs/train_many_nodes.slurm ... --run.spares 1
#
# Signals reach the ranks, and what mpirun says at the end can be believed: jobs/ulfm.sh.
#
# `make` allows PyPI's Open MPI more ranks than cores, and then it fills the first node with all of them: --map-by slot.
#
# Run with PyPI's Open MPI 5.0 under Slurm 22.05, on nodes that are emulated (tests/slurm). Under PBS: never.
if [ -n "${PBS_NODEFILE:-}" ]; then
    launcher=(jobs/ulfm.sh -np "$ranks" --hostfile "$PBS_NODEFILE" --map-by slot)
else
    launcher=(jobs/ulfm.sh -np "$SLURM_NTASKS" --map-by slot)
fi
