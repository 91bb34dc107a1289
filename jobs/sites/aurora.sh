# shellcheck shell=bash disable=SC2034,SC2154 # set in, and for, jobs/common.sh
# Aurora (ALCF): PBS and PALS. Change mpiprocs to the number of GPU tiles of a node.
#
#     MPILM_SITE=aurora qsub -V jobs/train_many_nodes.pbs
#
# The site's gpu_tile_compact.sh gives each rank a tile (ZE_AFFINITY_MASK, from PALS_LOCAL_RANKID). mpi4py must be built
# against the site's MPI: pip install --no-binary=mpi4py mpi4py.
#
# Never run there.
launcher=(mpiexec -n "$ranks" --ppn "$ranks_per_node" gpu_tile_compact.sh)
