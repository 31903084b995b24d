# make setup | demo | test | lint | fuzz | audit | test-real | test-sweeps | test-kv | test-faults | test-rebalance | test-vllm | test-lab | test-lab-real | test-lab-rebalance | test-lab-firewall | test-rdma | test-first-contact | soak | bench-deploy | bench-client | lab-up | lab-status | lab-down | tiny-model | bundle | lock | flags | docs | clean
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make bundle` put beside the checkout takes the place of a registry.
WHEELS := $(if $(wildcard .wheels),--no-index --find-links .wheels)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes $(WHEELS)

.PHONY: setup setup-dev demo test fuzz audit test-real test-sweeps test-kv test-faults test-rebalance test-vllm test-lab test-lab-real test-lab-rebalance test-lab-firewall test-rdma test-first-contact soak bench-deploy bench-client lab-deps lab-up lab-status lab-down tiny-model bundle lint lock flags docs clean

setup: $(VENV)/.controller

$(VENV)/.controller: requirements/controller.txt bench/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed (this is %d.%d): make setup PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Setting up $(VENV): ansible-core, pdbench and what plots need (a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements/controller.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e bench
	@touch $@
	@echo "Done. Now: . $(VENV)/bin/activate && ansible-playbook deploy_pd.yml"

setup-dev: $(VENV)/.dev

$(VENV)/.dev: $(VENV)/.controller requirements/dev.txt
	@echo "Adding what the tests need"
	@$(PIP) -r requirements/dev.txt
	@touch $@

demo: setup
	@tools/demo.sh

# For a controller without a registry: docs/hosts.md, "A rented GPU container"
bundle: setup
	@$(BIN)/python tools/bundle.py $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint

# Local tests that `make test-real` runs, so that `make test` stays under ten minutes on two cores
REAL_TOO := $(addprefix tests/local/test_,other_routers.py weights.py verbs_doctor.py verbs_modes.py verbs_tls.py gate_faults.py \
	profile.py advise_verbs.py)
# Sweeps rehearsed to their reports and one resumed, ratio=auto, rebalance.yml on one machine, pdbench autoscale (CI runs them, too)
SWEEPS := $(addprefix tests/local/test_,sweep_plays.py sweep_shipped.py auto.py verbs_rebalance.py autoscale.py)

# Both at once: the linters take one core, and half of the tests wait for other programs
test: setup-dev
	@mkdir -p .pd; $(MAKE) --no-print-directory lint >.pd/lint.log 2>&1 & lint=$$!; \
	 tests=0; $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(REAL_TOO) $(SWEEPS)) || tests=$$?; \
	 linted=0; wait $$lint || linted=$$?; cat .pd/lint.log; exit $$((tests + linted))

# Known vulnerabilities of what the locks pin (asks a public service); exit code 1: some, 2: could not be looked up
audit: setup .pd/audit/bin/pip-audit
	$(BIN)/python tools/audit.py $(ARGS)

.pd/audit/bin/pip-audit: requirements/audit.txt
	@$(PYTHON) -m venv .pd/audit
	@.pd/audit/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/audit.txt
	@touch $@

# Bad input for as long as one likes: it prints the seed, and of what fails the smallest input. ARGS="--seed 7 --only trace" repeats one
fuzz: setup-dev
	PYTHONPATH=tests:bench:library/module_utils $(BIN)/python -m fuzz --minutes $(or $(MINUTES),5) $(ARGS)

# Both at once, as in `test`: an engine that starts has a core for itself, and plays wait for it
test-real: setup-dev tiny-model
	@tools/real_packages.sh
	@mkdir -p .pd; $(BIN)/pytest -n 2 --dist loadfile $(REAL_TOO) >.pd/real-too.log 2>&1 & too=$$!; \
	 tests=0; $(BIN)/pytest tests/real -o timeout=900 || tests=$$?; \
	 others=0; wait $$too || others=$$?; cat .pd/real-too.log; exit $$((tests + others))

# Three shipped sweeps rehearsed on the emulated engine to their reports, one killed in a cell and resumed; the best two ratios measured,
# a ratio changed by hand and by pdbench autoscale: nine minutes
test-sweeps: setup-dev
	$(BIN)/pytest -n 2 --dist load $(SWEEPS) -o timeout=1800

# The contents of the KV cache on real SGLang, beside an aggregated server; it takes its engine from `make test-real`
test-kv: setup-dev tiny-model
	PD_TEST_KV=1 $(BIN)/pytest tests/real/test_kv_correct.py -s -o timeout=1500

# Every fault of docs/reliability.md on real SGLang; it takes its engine from `make test-real`
test-faults: setup-dev tiny-model
	PD_TEST_FAULTS=1 $(BIN)/pytest tests/real/test_faults.py -s -o timeout=1500

# Another ratio while three engines of real SGLang serve; it takes its engine from `make test-real`
test-rebalance: setup-dev tiny-model
	PD_TEST_REBALANCE=1 $(BIN)/pytest tests/real/test_rebalance.py -s -o timeout=1500

# Real vLLM on this machine's CPU: 3.5 GB and some minutes more, so a target of its own
test-vllm: setup-dev tiny-model
	PD_TEST_VLLM=1 $(BIN)/pytest tests/real/test_local_vllm.py -o timeout=1500

# Real systemd hosts on this machine, over SSH (root; skipped with the reason elsewhere): docs/reliability.md
LAB := PYTHONPATH=tests $(BIN)/python -m lab

test-lab: setup-dev lab-deps
	$(BIN)/pytest tests/lab -o timeout=900 --ignore tests/lab/test_real_engine.py --ignore tests/lab/test_rdma_vm.py \
	 --ignore tests/lab/test_rebalance.py --ignore tests/lab/test_soak.py --ignore tests/lab/test_firewall.py

# RDMA facts, and the bytes of NIXL and Mooncake, over SoftRoCE in a VM emulated in software: minutes; the first run makes the VM, some minutes more
test-rdma: setup-dev
	@for tool in qemu-system-x86_64 cpio mmdebstrap; do command -v $$tool >/dev/null || missing=1; done; \
	 [ -z "$${missing:-}" ] || apt-get install -y -q --no-install-recommends qemu-system-x86 cpio mmdebstrap
	$(BIN)/pytest tests/lab/test_rdma_vm.py -s -o timeout=1200

# README.md to the letter on a bare Debian and a bare Ubuntu root filesystem (root; skipped with the reason elsewhere): five minutes
test-first-contact: setup-dev lab-deps
	$(BIN)/pytest tests/first_contact -s -o timeout=2400

# Real SGLang on CPU on two of these hosts, KV over the bridge; it takes its engine from `make test-real`
test-lab-real: setup-dev lab-deps
	$(BIN)/pytest tests/lab/test_real_engine.py -o timeout=900

# firewall: true on these hosts: who is let in, who is not, after a reboot, through a change of ratio; six minutes
test-lab-firewall: setup-dev lab-deps
	$(BIN)/pytest tests/lab/test_firewall.py -o timeout=900

# Ten changes of ratio and 10,000 requests and more, by restart and in place: a quarter of an hour, docs/results/rebalance.md
test-lab-rebalance: setup-dev lab-deps
	PD_REBALANCE_CHANGES=10 $(BIN)/pytest tests/lab/test_rebalance.py -s -o timeout=3600

# Load for as long as one likes, faults from a seeded schedule, and an account of every request: docs/results/soak.md
soak: setup-dev lab-deps
	PD_SOAK_MINUTES=$(or $(MINUTES),45) PD_SOAK_SEED=$(or $(SEED),1) $(BIN)/pytest tests/lab/test_soak.py -s \
	 -o timeout=$$(( $(or $(MINUTES),45) * 90 + 1800 ))

lab-deps: setup
	@$(LAB) deps

# `pdbench run` beside its peers and a server that knows the truth, in turns: docs/results/client.md. gcc and 2 GB for the peers'
# virtualenvs are needed; half an hour, ARGS="--repeats 1" for a look
bench-client: setup
	PYTHONPATH=bench $(BIN)/python -m yardstick $(ARGS)

# What deploy, no-op and ratio change cost on 4, 16 and 48 hosts: docs/results/deploy-scale.md
bench-deploy: setup-dev lab-deps
	$(LAB).scale $(N)

lab-up: lab-deps
	@$(LAB) up $(or $(N),4)

lab-status lab-down: setup
	@$(LAB) $(@:lab-%=%)

# The model of inventory/local-sglang: random weights, a tokenizer trained here; nothing is downloaded but two packages.
tiny-model: .pd/tiny-model/config.json

.pd/tiny-model/config.json: tests/real/make_tiny_model.py requirements/tiny-model.txt
	@$(PYTHON) -m venv .pd/tiny-model-venv
	@.pd/tiny-model-venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/tiny-model.txt
	@.pd/tiny-model-venv/bin/python tests/real/make_tiny_model.py .pd/tiny-model
	@rm -rf .pd/tiny-model-venv

lock: setup-dev
	@tools/lock.sh

flags: setup-dev
	$(BIN)/python tools/flag_table.py --all

docs: setup
	$(BIN)/python tools/docs_variables.py
	$(BIN)/python tools/docs_validity.py
	$(BIN)/python tools/docs_doctor.py

clean:
	rm -rf .pd results .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible
