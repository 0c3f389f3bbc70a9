# make          lists the targets
# Everything runs in .venv, which `make .venv` creates.
.DEFAULT_GOAL := help
.PHONY: help test slow lint format bench ci

help: ## list the targets
	@grep -E '^[.a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv: ## a virtual environment with fastdlp and its tools, editable
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'

test: .venv ## the tests but the slow ones
	.venv/bin/pytest -q -n 2 --dist worksteal -m "not slow"

slow: .venv ## the slow tests: compilers, other processes, wrong variants, other libraries
	.venv/bin/pytest -q -n 2 --dist worksteal -m slow

lint: .venv ## ruff and the type checker
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

format: .venv ## fix and format with ruff
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

bench: .venv ## a federated round beside PEFT on this machine
	.venv/bin/fastdlp bench round

ci: ## all checks in a fresh environment: tests, slow tests, lint, types
	.ci/run
