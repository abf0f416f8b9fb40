# make train: install, then train the main job.  make test, make test-long: install, then
# run the tests; those marked `long` start several processes or take long.
PYTHON ?= python3
VENV ?= .venv

.PHONY: install train test test-long lint
install: $(VENV)/.installed
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python {sys.version.split()[0]} is too old: Triform needs 3.11 or newer; make PYTHON=python3.11 install")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

train: install
	$(VENV)/bin/python train.py --config=configs/transformer_cldr.py --workdir=runs/transformer_cldr

# Compilation takes most of their time; programs that run for milliseconds gain nothing
# from what XLA's optimisations cost.
test: install
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" \
		$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not long" tests

test-long: install
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m long tests

lint: install
	$(VENV)/bin/ruff check .
