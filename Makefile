# make          what there is to make
# Everything runs in .venv, which `make .venv` creates.
.DEFAULT_GOAL := help
.PHONY: help test slow lint format bench ci

help: ## this list
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

format: .venv ## let ruff put things in order
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

bench: .venv ## a federated round beside PEFT on this machine
	.venv/bin/fastdlp bench round

ci: ## what has to pass: fresh environment, tests, lint, types
	.ci/run
