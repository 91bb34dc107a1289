# shellcheck shell=bash disable=SC2016,SC2034,SC2154 # for jobs/common.sh and mpiexec
# Polaris (ALCF): PBS, PALS and Cray MPICH, four GPUs a node, the last beside the first cores. Change mpiprocs to 4.
#
#     MPILM_SITE=polaris qsub -V jobs/train_many_nodes.pbs
#
# How mpi4py is built: jobs/sites/cray.sh. Ranks take GPUs in reverse, because GPU 3 is nearest to the first cores.
#
# Never run there.
export MPICH_GPU_SUPPORT_ENABLED=${MPICH_GPU_SUPPORT_ENABLED:-0}
select_gpu='CUDA_VISIBLE_DEVICES=$((3 - PMI_LOCAL_RANK % 4)) exec "$@"'
launcher=(mpiexec -n "$ranks" --ppn "$ranks_per_node" bash -c "$select_gpu" select_gpu)
