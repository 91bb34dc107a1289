# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# MPICH and what descends from it, PyPI's or the site's own. Under Slurm srun starts it, through PMI-2, under PBS its
# mpiexec.
#
#     MPILM_SITE=mpich sbatch jobs/train_one_node.slurm ...
#
# Run with PyPI's MPICH 5.0 under Slurm 22.05, on nodes that are emulated (tests/slurm). Under PBS: never.
if [ -n "${PBS_NODEFILE:-}" ]; then
    launcher=(mpiexec -n "$ranks" -f "$PBS_NODEFILE")
else
    launcher=(srun --mpi=pmi2 "${srun_options[@]}")
fi
