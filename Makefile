# ptbin: everything that a fresh machine with Python 3.11+ and make needs.
#
#   make demo        train small models, convert them through the Prefect flow, look at the results
#   make demo-deploy a server, a worker and a schedule on loopback; pictures of the UI
#   make test        the test suite, against the installed packages
#   make test-quick  a part of it: no servers, no processes, nothing that takes seconds; about a minute on two cores
#   make check       ruff, mypy, import rules
#   make bench       whole-process measurements; writes docs/benchmarks*.md (about 12 GB of disk, BENCH_DIR;
#                    16 GB of memory for the part on S3, which is `make bench-s3` by itself)
#   make test-slow   the suite with its slow part (archives beyond 4 GiB, every kill, automations)
#   make test-stores the contract of stores on Google's and Azure's storage (emulated) and on sftp
#   make docs        the documentation as a site, in site/ (installs MkDocs; no test needs it)
#   make s3-server   run a throw-away S3 server on loopback until Ctrl-C; says where it listens
#   make clean       remove .venv and everything that the commands above made
#
# PYTHON chooses the interpreter for .venv; PIP_ARGS goes to every `pip install`.

PYTHON ?= python3
PIP_ARGS ?=
BENCH_DIR ?=

VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Without byte code of 37,000 modules, 35 s of a core: those that are imported get theirs then.
INSTALL := $(PIP) install --no-compile $(PIP_ARGS) --constraint constraints.txt
SOURCES := $(shell find ptbin tasks flows deployments -type f ! -name '*.pyc')

# The packages lie in the top folder, where Python would find them before the installed ones. -P (here by
# its variable, so that child processes inherit it) takes the working directory off sys.path.
# demo and bench do without: -P would hide a script's own neighbours too.
export PYTHONSAFEPATH := 1
# Some images set it. Then each of a thousand processes compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo docs test test-quick test-slow test-stores check bench bench-s3 bench-peers s3-server s3-packages store-packages browser-packages postgres-packages prometheus-packages demo-deploy clean

install: $(VENV)/.requirements $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ptbin needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Two of the rules below install into the same environment.
.NOTPARALLEL:

# What ptbin itself needs, which is all that `make demo` installs: anew only when the requirements change.
# hatchling first, so that the build of our own wheel takes the pinned one and not whatever is newest.
$(VENV)/.base: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) hatchling
	$(INSTALL) --no-build-isolation .
	@touch $@

# What the tests and checks need on top: other people's writers and readers, servers, linters.
$(VENV)/.requirements: $(VENV)/.base
	$(INSTALL) --no-build-isolation '.[dev,interop,dask,ray,deployments,mlflow,hub,signing,aws,gcp,otlp]'
	@# DeepSpeed comes as source; its setup imports torch, and files beside it (hence no -P). Without it the
	@# tests on real ZeRO folders are skipped.
	-env -u PYTHONSAFEPATH DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
	@touch $@

# Not editable: what is tested is what a user gets.
$(VENV)/.installed: $(VENV)/.base $(SOURCES) README.md
	$(PIP) install --no-deps --no-build-isolation --force-reinstall .
	@touch $@

demo: $(VENV)/.installed
	env -u PYTHONSAFEPATH $(BIN)/python docs/demo/demo.py demo-output

# The same on a Prefect server with a worker, as an operator runs it; pictures of the UI go to
# demo-deploy-output/screenshots (SCREENSHOTS=docs/screenshots renews those of the documentation).
demo-deploy: install browser-packages postgres-packages
	env -u PYTHONSAFEPATH $(BIN)/python docs/demo/demo_deploy.py demo-deploy-output \
	  $(if $(SCREENSHOTS),--screenshots $(SCREENSHOTS))

# On more processes than there are cores, because many tests wait for servers. Whole files each, so that what the
# tests of a file share is made once. With PYTEST_ARGS (paths, -k) everything in one process.
TEST_PROCESSES ?= 4
test: install s3-packages browser-packages postgres-packages prometheus-packages
	$(BIN)/python -m pytest $(if $(PYTEST_ARGS),$(PYTEST_ARGS),-n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder)

# What starts neither a server nor a process and takes no seconds: the loop while working on the engine.
test-quick: install
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not slow and not thorough and not starts_processes and not starts_servers" $(PYTEST_ARGS)

test-slow: install s3-packages browser-packages postgres-packages prometheus-packages
	$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

test-stores: install store-packages
	$(BIN)/python -m pytest -n0 -m other_stores tests/contract $(PYTEST_ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Its two processes have three seconds to start, which a busy machine may not give them: status 2.
	$(BIN)/mypy || { [ $$? = 2 ] && $(BIN)/mypy --num-workers 0; }
	$(BIN)/lint-imports --no-logo --no-cache

# All of them, also after one that missed a threshold.
bench: install bench-peers s3-packages
	@status=0; \
	for part in run.py "formats.py --report docs/benchmarks-formats.md" restore.py flow.py "s3.py --peers $(PEERS)"; do \
	  env -u PYTHONSAFEPATH $(BIN)/python benchmarks/$$part $(if $(BENCH_DIR),--work-dir $(BENCH_DIR)) || status=1; \
	done; exit $$status

# S3's part alone: half an hour on a machine that does nothing else.
bench-s3: install bench-peers s3-packages
	env -u PYTHONSAFEPATH $(BIN)/python benchmarks/s3.py --peers $(PEERS) $(if $(BENCH_DIR),--work-dir $(BENCH_DIR))
	env -u PYTHONSAFEPATH $(BIN)/python benchmarks/s3_many.py $(if $(BENCH_DIR),--work-dir $(BENCH_DIR))

# Other people's tools to compare with, beside .venv because awscli pins other versions of what ptbin needs;
# mergekit without its requirements, of which its loader needs those that .venv has. What cannot be had is left
# out of the report. No `make` rule can tell whether rclone is there, so it is asked for each time.
bench-peers: install $(PEERS)/.aws $(PEERS)/.mergekit
	@command -v rclone >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends rclone >/dev/null 2>&1; } \
	  || echo "rclone is not to be had here"

$(PEERS)/.aws: | $(VENV)/.created
	-$(PYTHON) -m venv $(PEERS)/aws \
	  && $(PEERS)/aws/bin/pip --disable-pip-version-check -qq install $(PIP_ARGS) awscli==1.46.2 && touch $@

$(PEERS)/.mergekit: | $(VENV)/.created
	-$(PIP) install $(PIP_ARGS) --no-deps --upgrade --target $(PEERS)/mergekit mergekit==0.1.5 && touch $@

# A real S3 server until Ctrl-C. The module is a test's, and lies in the top folder: -P would hide it.
s3-server: install s3-packages
	env -u PYTHONSAFEPATH $(BIN)/python -m tests.servers.rados_gateway

# What that server is made of: Debian's packages, no service started. Where they cannot be had, the tests and
# benchmarks that need it are skipped and say so.
s3-packages:
	@if command -v radosgw >/dev/null && command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing ceph-mon ceph-osd radosgw (for the integration test on a real S3 server)"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    ceph-mon ceph-osd radosgw; } >/dev/null 2>&1 \
	    || echo "not to be had here: the integration test on a real S3 server will be skipped"; \
	else \
	  echo "no radosgw, and not root: the integration test on a real S3 server will be skipped"; \
	fi

# Other stores' clients and emulators, for `make test-stores` alone: 400 MB. What cannot be had is skipped.
store-packages: $(VENV)/.created
	-@$(BIN)/python -c 'import adlfs, gcp_storage_emulator, paramiko' 2>/dev/null \
	  || $(PIP) install $(PIP_ARGS) --constraint constraints.txt adlfs==2026.8.0 gcp-storage-emulator==2026.7.19 paramiko==5.1.0
	-@[ -d $(VENV)/azurite ] || npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV)/azurite azurite@3.37.0
	-@command -v sshd >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends openssh-server >/dev/null 2>&1; } \
	  || echo "sshd is not to be had here"

# Where Prefect's server keeps its database in the tests of deployments/ and in demo-deploy. Debian would also
# start a cluster of its own; that is told not to.
postgres-packages:
	@if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing postgresql (for the tests of the deployments)"; \
	  { mkdir -p /etc/postgresql-common \
	    && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf \
	    && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	      postgresql; } >/dev/null 2>&1 || echo "not to be had here: those tests will be skipped"; \
	else \
	  echo "no postgresql, and not root: the tests of the deployments will be skipped"; \
	fi

# Prometheus with promtool, and its Pushgateway, for the tests of deployments/monitoring: unpacked into the environment,
# because the packages would start servers.
prometheus-packages: $(VENV)/.created
	@if [ -x $(VENV)/prometheus/usr/bin/promtool ] && [ -x $(VENV)/prometheus/usr/bin/prometheus-pushgateway ]; then :; \
	elif command -v apt-get >/dev/null && command -v dpkg >/dev/null; then \
	  echo "fetching prometheus and prometheus-pushgateway (for the tests of metrics, board and alert rules)"; \
	  { folder=$$(mktemp -d) && (cd $$folder && apt-get download prometheus prometheus-pushgateway) \
	    && for package in $$folder/*.deb; do dpkg -x $$package $(VENV)/prometheus; done && rm -r $$folder; } >/dev/null 2>&1 \
	    || echo "not to be had here: those tests will be skipped"; \
	else \
	  echo "no apt-get here: tests of metrics on a real Prometheus will be skipped"; \
	fi

# A browser for the tests of the report and for the screenshots of demo-deploy.
browser-packages:
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium (for the tests of the report)"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    chromium fonts-dejavu-core; } >/dev/null 2>&1 || echo "not to be had here: those tests will be skipped"; \
	else \
	  echo "no chromium, and not root: the tests of the report in a browser will be skipped"; \
	fi

# The site, with the references made from the command line's own help and the docstrings. What is installed is
# what they are made from.
$(VENV)/.docs: $(VENV)/.base
	$(INSTALL) --no-build-isolation '.[docs]'
	@touch $@

docs: $(VENV)/.docs $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean
	@echo "site/index.html"

clean:
	rm -rf $(VENV) $(PEERS) site demo-output demo-deploy-output benchmarks/work build dist .mypy_cache .ruff_cache .pytest_cache \
	  .hypothesis .import_linter_cache
