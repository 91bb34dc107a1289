#!/usr/bin/env bash
# Open MPI's daemon of a node, deaf to the signal by which Slurm tells that the time is nearly up (--signal=USR1@60): it
# would die of it, and the whole job with it. Not submitted; jobs/sites/openmpi_mpirun.sh has mpirun start it.
trap '' USR1
exec prted "$@"
