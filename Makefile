# make train | make test | make lint    everything is installed on the way, into .venv, from uv.lock
PYTHON ?= python3
UV     := .tools/bin/uv
RUN    := .venv/bin/python
WORKDIR ?= runs/glam_nano
SYNCED := .venv/.synced

export UV_PYTHON_DOWNLOADS = never
export UV_LINK_MODE = copy
export JAX_PLATFORMS ?= cpu

.PHONY: setup train test lint format clean
.DELETE_ON_ERROR:

train: setup
	$(RUN) -m experiments.train --config=configs/glam_nano.py --workdir=$(WORKDIR)

test: setup
	$(RUN) -m pytest -n 2 --dist loadfile

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv .tools

# An environment made by another Python is made anew.
setup:
	@version=$$($(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "moe_jax needs Python >= 3.11, this is " + sys.version; print(sys.version)') || exit 2; \
	if [ "$$(cat $(SYNCED) 2>/dev/null | head -1)" != "$$version" ] || [ uv.lock -nt $(SYNCED) ] || [ pyproject.toml -nt $(SYNCED) ]; then \
	  echo "setting up .venv ..."; \
	  [ -x $(UV) ] && $(UV) --version >/dev/null 2>&1 || { rm -rf .tools && $(PYTHON) -m venv .tools && .tools/bin/python -m pip install -q uv; } && \
	  $(UV) sync --quiet --frozen --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" && echo "$$version" > $(SYNCED); \
	fi
