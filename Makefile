# The tasks of noxfile.py under the names that Sphinx users type. The first call
# makes the environment .venv from requirements.txt; later calls reuse it.

PYTHON ?= python3
NOX = .venv/bin/python -m nox -s
OLD_PYTHON = "make: $(PYTHON) is Python %d.%d; this site needs 3.11 or newer. Try: make PYTHON=python3.12"

.PHONY: html html-noplot test serve linkcheck lint clean help \
	record recordings wheels unpack
.DEFAULT_GOAL := html

html: .venv/ready
	@$(NOX) html -- $(if $(PATTERN),'$(PATTERN)')

test: .venv/ready
	@$(NOX) test -- $(ARGS)

serve: .venv/ready
	@$(NOX) serve -- $(PORT)

html-noplot recordings linkcheck lint clean: .venv/ready
	@$(NOX) $@

unpack: .venv/ready
	@$(NOX) unpack -- $(if $(ARCHIVE),'$(ARCHIVE)')

wheels: .venv/ready
	@$(NOX) wheels -- $(WHEELS_PYTHON) $(WHEELS_PROCESSOR)

# With WHEELS, a folder that "make wheels" made elsewhere, nothing is downloaded: the
# wheels go to .record/; torch, numpy, matplotlib, scikit-learn are those of $(PYTHON).
ifdef WHEELS
record:
	rm -rf .record
	$(PYTHON) -m pip install --disable-pip-version-check --no-index --quiet \
		--find-links "$(WHEELS)" --target .record -r requirements-record.txt
	$(PYTHON) -m pip install --disable-pip-version-check --no-index --quiet --no-deps \
		--find-links "$(WHEELS)" --target .record -r requirements-tutorials.txt
	@PYTHONPATH="$(CURDIR)/.record$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON) -m nox -s record -- $(if $(MACHINE),'$(MACHINE)')
else
record: .venv/ready
	@$(NOX) record -- $(if $(MACHINE),'$(MACHINE)')
endif

help:
	@echo "make html                  execute what changed, build _build/html"
	@echo "make html PATTERN=regex    execute only the tutorials whose path matches"
	@echo "make html-noplot           build without executing"
	@echo "make record [MACHINE=name] execute what changed, record it in recordings/"
	@echo "make recordings            show what is recorded where, and what is outdated"
	@echo "make wheels                collect wheels/ for recording without network"
	@echo "make record WHEELS=wheels  record with them and with the torch that is there"
	@echo "make unpack ARCHIVE=file   check an archive of recordings, put it in place"
	@echo "make test [ARGS=...]       lint and every test; ARGS go to pytest"
	@echo "make serve [PORT=8000]     serve _build/html on this machine"
	@echo "make linkcheck             follow every external link (needs the network)"
	@echo "make lint                  check code, spelling and reStructuredText"
	@echo "make clean                 remove what is generated; .venv stays"

.venv/ready: requirements.txt requirements-record.txt requirements-tutorials.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and $(OLD_PYTHON) % v)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@
