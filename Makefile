# Every target sets up .venv by itself, once (requirements/setup.sh). `make DEVICE=cpu …` or `gpu` overrides
# what it finds; ARGS is passed on, as in `make test ARGS="-k wire"` or `make run ARGS="--help"`.
.DEFAULT_GOAL := help
.PHONY: help setup run test lint check bench lock clean

DEVICE := auto
ARGS :=
BIN := .venv/bin

help:   ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup:  ## install what is needed into .venv (all other targets do that too)
	@requirements/setup.sh $(DEVICE)

run: setup  ## the demo: real engines, real workflows, one table
	$(BIN)/chimera demo $(ARGS)

test: setup  ## all tests, real vLLM engines included
	$(BIN)/python -m pytest $(ARGS)

lint: setup  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --warnings

check: lint test  ## what CI runs

bench: setup  ## cost of the daemon itself: round trips, stages/s, events/s of the core
	$(BIN)/chimera bench overhead $(ARGS)
	$(BIN)/chimera bench core $(ARGS)

lock: setup  ## resolve dependencies again and write requirements/cpu.lock
	$(BIN)/python requirements/lock.py

clean:  ## remove .venv, caches and scratch results
	rm -rf .venv .venv.lock runs dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
