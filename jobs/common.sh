# shellcheck shell=bash
# What the scripts of this folder share. Not submitted, but sourced, in the folder of the repository. It gives
#     launch python -m mpilm.bench ...     on all ranks of the allocation, in the way of the site
#     train --run.dir runs/x ...           the same of mpilm.train, again after ranks have died (jobs/again.sh)
#
# MPILM_SITE: the settings, jobs/sites/$MPILM_SITE.sh; without it, openmpi.
# MPILM_VENV: the environment, on a file system that all nodes see; without it, .venv. `none`: python is on PATH.
# MPILM_ARGS: the options of a PBS script, which has no command line; values without spaces.
export MPILM_SITE=${MPILM_SITE:-openmpi} MPILM_VENV=${MPILM_VENV:-.venv} MPILM_ARGS=${MPILM_ARGS:-}
# srun takes over from sbatch not the cores, but --export=NONE, and would not find this environment.
export SLURM_EXPORT_ENV=ALL SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# shellcheck disable=SC2034 # for PBS scripts
read -ra options <<<"$MPILM_ARGS"

# All ranks end with 75 within moments, so whoever ends first does not have the others killed; after a minute, yes.
# shellcheck disable=SC2034 # for the sites
srun_options=(--cpu-bind=cores --kill-on-bad-exit=0 --wait=60)

if [ -n "${PBS_NODEFILE:-}" ]; then # a line for each rank
    ranks=$(wc -l <"$PBS_NODEFILE")
    # shellcheck disable=SC2034 # for the sites
    ranks_per_node=$((ranks / $(sort -u "$PBS_NODEFILE" | wc -l)))
fi

launcher=()
# shellcheck disable=SC1090 # one of many
source "jobs/sites/$MPILM_SITE.sh"
if [ "$MPILM_VENV" != none ]; then
    # shellcheck disable=SC1091 # made by make
    source "$MPILM_VENV/bin/activate"
fi

launch() {
    "${launcher[@]}" "$@"
}

train() {
    jobs/again.sh "${launcher[@]}" python -m mpilm.train "$@"
}
