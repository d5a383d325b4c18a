# make demo   train on scanned digits and write demo-out/index.html
# make test   run the tests
# make check  lint, format, types
# make bench  this network beside torchvision's on this CPU
# make compat smoke-test the wheel with every Python that is found, the oldest torch and the newest: docs/compat.md
# make docs   build the documentation into build/docs; then open build/docs/index.html
# make readme write the tables and pictures of README.md and bench/README.md anew from bench/results
# Each creates .venv and installs what it needs, once.
# make configs choose the configs that ship for cards that are not here
# make gpu    check the kernels on this machine's GPU and time them, with the packages that $(PYTHON) has

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

# The tests build many large networks: blocks that malloc keeps are not fetched from the system again.
MALLOC = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

.PHONY: configs demo test check compat bench docs readme gpu clean

demo: .venv/installed-demo
	.venv/bin/python -m alexnet_triton demo --out demo-out

test: .venv/installed-test
	$(MALLOC) .venv/bin/python -m pytest -n 2

check: .venv/installed-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	rm -rf build/check build/lib
	$(PIP) --no-deps --target build/check .
	cd build/check && ../../.venv/bin/python -m mypy --config-file ../../pyproject.toml -p alexnet_triton
	cd build/check && MYPYPATH=. ../../.venv/bin/python -m mypy --config-file ../../pyproject.toml ../../tests/typed_use.py

bench: .venv/installed-bench
	.venv/bin/python -m alexnet_triton bench cpu --out bench-out

readme: .venv/installed-demo
	.venv/bin/python -m alexnet_triton.bench readme

compat: .venv/installed-compat
	.venv/bin/python -m nox

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

gpu:
	$(PYTHON) -c 'import alexnet_triton.bench' 2>/dev/null \
		|| $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m alexnet_triton bench gpu

# What ships for cards that were not at hand, from the compiler's figures: ten minutes on two cores. A file that was
# measured (make gpu leaves one, configs.json) takes the place of its card's as it is.
CONFIGS = alexnet_triton/configs
configs: .venv/installed-test
	for variant in paper torchvision merged caffe; do \
		for card in sm_90:h100 sm_80:a100; do \
			.venv/bin/python -m alexnet_triton autotune --dry-run --variant $$variant --batch 1,16,128,1024 \
				--target $${card%:*} --export $(CONFIGS)/$${card#*:}.json || exit 1; \
		done; \
	done
	sed 's/^  "h100": {/  "h200": {/' $(CONFIGS)/h100.json >$(CONFIGS)/h200.json  # the same multiprocessors
	rm -f $(CONFIGS)/*.lock

clean:
	rm -rf .venv build demo-out bench-out gpu-out

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# A stamp is made when its installation has succeeded.
.venv/installed-%: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[$*]'
	touch $@
