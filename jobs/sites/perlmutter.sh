# shellcheck shell=bash disable=SC2016,SC2034 # for jobs/common.sh and srun
# Perlmutter (NERSC): Cray MPICH, four GPUs a node, the first beside the last cores. Change --ntasks-per-node to 4 and
# --cpus-per-task to 32.
#
#     MPILM_SITE=perlmutter sbatch --gpus-per-node=4 jobs/train_many_nodes.slurm ...
#
# How mpi4py is built: jobs/sites/cray.sh. All ranks of a node see all its GPUs to Slurm (--gpu-bind=none): in device
# groups of their own they could not read each other's memory. From WarpX's script for this machine.
#
# Never run there.
source jobs/sites/cray.sh
export MPICH_OFI_NIC_POLICY=GPU
select_gpu='CUDA_VISIBLE_DEVICES=$((3 - SLURM_LOCALID)) exec "$@"'
launcher+=(--gpus-per-node=4 --gpu-bind=none bash -c "$select_gpu" select_gpu)
