# make train | make test | make notebooks | make matrix | make faults | make tpu | make gpu | make lint    everything is installed on the way, from uv.lock into .venv
PYTHON ?= python3
UV     := .tools/bin/uv
RUN    := .venv/bin/python
WORKDIR ?= runs/glam_nano
ENV    := .venv
SYNCED  = $(ENV)/.synced

export UV_PYTHON_DOWNLOADS = never
export UV_LINK_MODE = copy
export JAX_PLATFORMS ?= cpu

.PHONY: setup train test notebooks matrix museum mutations faults tpu gpu lint format clean
.DELETE_ON_ERROR:

train: setup
	$(RUN) -m experiments.train --config=configs/glam_nano.py --workdir=$(WORKDIR)

# Whole files go to a worker, those that take long first: none is left alone with one at the end.
test: setup
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/laws tests/programs tests/components tests/faults

matrix: setup
	$(RUN) -m pytest -n 2 --dist loadgroup -m matrix

# Bugs of other codebases, and bugs of our own, planted one by one: each must be caught.
museum: setup
	$(RUN) -m tests.museum

mutations: setup
	$(RUN) -m tests.mutations

# Hostile input and broken machines, as a whole; tests/faults says what there is.
faults: setup
	$(RUN) -m pytest tests/faults -m "faults or not faults" --durations=10

# Compiles for slices of TPU pods: no TPU is needed, but its compiler, which gets an environment of its own.
tpu:
	$(MAKE) setup ENV=.venv-tpu EXTRA="--extra tpu"
	.venv-tpu/bin/python -m pytest -m tpu --durations=5

# For a machine with an NVIDIA GPU, and Python >= 3.12.
gpu:
	@nvidia-smi -L 2>/dev/null || { echo "make gpu needs an NVIDIA GPU, and nvidia-smi finds none here; make test interprets its kernels."; exit 2; }
	$(MAKE) setup ENV=.venv-gpu EXTRA="--extra cuda"
	TEST_PLATFORMS=cuda,cpu .venv-gpu/bin/python -m pytest -m gpu --durations=5

# Executes the notebooks in place; 04 and 05 show these two runs, which are trained or resumed first.
notebooks: setup
	$(RUN) -m experiments.train --config=configs/glam_nano.py --workdir=runs/glam_nano
	$(RUN) -m experiments.train --config=configs/dense_nano.py --workdir=runs/dense_nano
	$(RUN) notebooks/execute.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv .venv-tpu .venv-gpu .tools

# An environment made by another Python is made anew. Where certificates are the system's own, uv is told to use them.
setup:
	@version=$$($(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "moe_jax needs Python >= 3.11, this is " + sys.version; print(sys.version)') || exit 2; \
	[ "$$(head -1 $(SYNCED) 2>/dev/null)" = "$$version" ] && [ $(SYNCED) -nt uv.lock ] && [ $(SYNCED) -nt pyproject.toml ] && exit 0; \
	echo "setting up $(ENV) ..."; \
	export UV_PROJECT_ENVIRONMENT=$(ENV); \
	$(UV) --version >/dev/null 2>&1 || { rm -rf .tools && $(PYTHON) -m venv .tools && .tools/bin/python -m pip install --quiet --disable-pip-version-check uv; } || exit 1; \
	sync="$(UV) sync --quiet --frozen $(EXTRA) --python $$($(PYTHON) -c 'import sys; print(sys.executable)')"; \
	$$sync 2>.tools/log || UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 $$sync || { cat .tools/log; exit 1; }; \
	echo "$$version" > $(SYNCED)
