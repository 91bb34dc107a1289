# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# Cray MPICH on a Slingshot network, under Slurm.
#
#     MPILM_SITE=cray sbatch jobs/train_many_nodes.slurm ...
#
# mpi4py must be built against the site's MPI, once, with the site's modules loaded:
#
#     make MPI=none .venv/.ready && source .venv/bin/activate
#     MPICC="cc -shared" pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py
#
# mpilm gives MPI host memory, so GPU support is off. With 1, mpi4py must have been built with the GTL library
# (libmpi_gtl_cuda or libmpi_gtl_hsa): MPI_Init ends with "GTL library is not linked" without it.
#
# Never run there.
export MPICH_GPU_SUPPORT_ENABLED=${MPICH_GPU_SUPPORT_ENABLED:-0}
launcher=(srun --mpi=cray_shasta "${srun_options[@]}")
