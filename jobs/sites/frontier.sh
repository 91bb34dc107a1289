# shellcheck shell=bash disable=SC2034 # for jobs/common.sh
# Frontier (OLCF): Cray MPICH, eight GPU dies a node, seven cores for each. Change --ntasks-per-node to 8 and
# --cpus-per-task to 7.
#
#     MPILM_SITE=frontier sbatch jobs/train_many_nodes.slurm ...
#
# How mpi4py is built: jobs/sites/cray.sh. Each rank sees one die, as device 0. Many ranks read many small files of the
# environment at their start: sbcast a packed one to the node's own disk.
#
# Never run there.
source jobs/sites/cray.sh
launcher+=(--gpus-per-task=1 --gpu-bind=closest)
