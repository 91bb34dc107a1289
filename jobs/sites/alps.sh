# shellcheck shell=bash disable=SC2034 # for jobs/common.sh
# Alps (CSCS): Cray MPICH, four GPUs a node. Change --ntasks-per-node to 4.
#
#     MPILM_SITE=alps sbatch jobs/train_many_nodes.slurm ...
#
# How mpi4py is built: jobs/sites/cray.sh. Without --gpus-per-task all ranks of a node would take its first GPU. More
# ranks than GPUs want the site's wrapper that starts MPS. GPU support of MPI stays off: with drivers from 580 on it
# makes Cray MPICH before 9.2 slow for many small messages of host memory. In a container: Open MPI 5 with libfabric,
# because the Open MPI 4 of NVIDIA's containers does not suit Slingshot.
#
# Never run there.
source jobs/sites/cray.sh
launcher+=(--gpus-per-task=1)
