# shellcheck shell=bash disable=SC2016,SC2034,SC2054 # for jobs/common.sh and srun
# LUMI-G: Cray MPICH, eight GPU dies (GCDs) a node, each nearest to other cores. Change --ntasks-per-node to 8.
#
#     MPILM_SITE=lumi sbatch --gpus-per-node=8 jobs/train_many_nodes.slurm ...
#
# How mpi4py is built: jobs/sites/cray.sh. Each rank sees one die; the list of cores is in the order of the dies.
# MPICH_GPU_SUPPORT_ENABLED=1, which the site advises, is for MPI on GPU memory.
#
# Never run there.
source jobs/sites/cray.sh
select_gpu='ROCR_VISIBLE_DEVICES=$SLURM_LOCALID exec "$@"'
launcher+=(--gpus-per-node=8 --cpu-bind=map_cpu:49,57,17,25,1,9,33,41 bash -c "$select_gpu" select_gpu)
