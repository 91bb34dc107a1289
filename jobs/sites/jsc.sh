# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# Juelich (JSC): psslurm starts the ranks. Change --ntasks-per-node to 4, the number of GPUs.
#
#     MPILM_SITE=jsc sbatch --gpus-per-node=4 jobs/train_many_nodes.slurm ...
#
# psslurm sets CUDA_VISIBLE_DEVICES for each task to the GPU nearest to its cores; export CUDA_VISIBLE_DEVICES=0,1,2,3
# overrides that. mpi4py must be built against the site's MPI: pip install --no-binary=mpi4py mpi4py. mpilm gives MPI
# host memory, so that ParaStation MPI's PSP_CUDA=1 is not needed.
#
# Never run there.
launcher=(srun "${srun_options[@]}")
