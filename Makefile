# Every verb sets up .venv first if need be; see deploy/setup_env.sh.
MODEL ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint bench compare gpu-check loadtest faults kinds compat lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv from requirements.lock (done by the others when needed)
	@deploy/setup_env.sh

serve: setup ## Serve a model: MODEL=name or path, ARGS="further flags"
	.venv/bin/pd-serve serve $(MODEL) $(ARGS)

test: setup ## Run all tests in three processes: ARGS="-m 'not e2e'" for a part of them
	.venv/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests $(ARGS)

lint: setup ## Check style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: setup ## Measure migration, of every kind of engine, overhead, reports, steps, links, many instances, the simulator and its speed; writes results/bench-*.json
	@mkdir -p results
	.venv/bin/python -m loadtests.bench migration --json results/bench-migration.json $(ARGS)
	.venv/bin/python -m loadtests.bench kinds --json results/bench-kinds.json
	.venv/bin/python -m loadtests.bench overhead --json results/bench-overhead.json $(ARGS)
	.venv/bin/python -m loadtests.bench reports --json results/bench-reports.json $(ARGS)
	.venv/bin/python -m loadtests.bench step --json results/bench-step.json $(ARGS)
	.venv/bin/python -m loadtests.bench links --json results/bench-links.json $(ARGS)
	.venv/bin/python -m loadtests.bench scale --json results/bench-scale.json $(ARGS)
	.venv/bin/python -m loadtests.bench simulator --json results/bench-simulator.json $(ARGS)
	.venv/bin/python -m loadtests.bench simulation-speed --json results/bench-simulation-speed.json

compare: setup ## Measure ours beside plain vLLM, its NixlConnector and public routers (half an hour)
	.venv/bin/python -m loadtests.bench compare --json results/bench-compare.json $(ARGS)

gpu-check: setup ## Move requests between two instances on one GPU, of every kind of engine (10 minutes)
	@mkdir -p results
	.venv/bin/python -m tests.gpu.check --out results/gpu-check.json $(ARGS)

loadtest: setup ## Load a cluster of simulated engines for two minutes; writes results/loadtest/report.html
	.venv/bin/python -m loadtests $(ARGS)

faults: setup ## Try kills, freezes, mutated frames and mixed load on small clusters (10 minutes)
	PD_SERVE_FAULT_TESTS=1 .venv/bin/python -m pytest -q tests/e2e/test_faults.py $(ARGS)

kinds: setup ## Move requests of every kind between engines of every kind, and in a cluster (20 minutes)
	PD_SERVE_ALL_KINDS=1 .venv/bin/python -m pytest -q tests/integration/test_engine_kinds.py tests/integration/test_workers_of_kinds.py tests/e2e/test_request_kinds.py tests/integration/test_gpu_check.py $(ARGS)

compat: setup ## Try other clients and test suites at plain vLLM and at a cluster; writes results/compat.json
	@deploy/setup_compat.sh
	PD_SERVE_COMPAT_JSON=results/compat.json .venv/bin/python -m pytest -q tests/e2e/test_*_like_vllm.py $(ARGS)

lock: ## Write requirements.lock anew from pyproject.toml: ARGS=--upgrade for newer versions
	@deploy/make_lock.sh $(ARGS)

clean: ## Remove what tools leave behind; keeps .venv and the model cache
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist results/tmp
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
