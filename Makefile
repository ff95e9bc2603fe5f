# The tasks of noxfile.py under the names that Sphinx users type. The first call
# makes the environment .venv from requirements.txt; later calls reuse it.

PYTHON ?= python3
NOX = .venv/bin/python -m nox -s
OLD_PYTHON = "make: $(PYTHON) is Python %d.%d; this site needs 3.11 or newer. Try: make PYTHON=python3.12"
NO_BROWSER = "make $@ needs Chromium, which could not be downloaded here. Install it: apt install chromium"

.PHONY: html html-noplot test test-all audit serve linkcheck lint clean help record recordings
.DEFAULT_GOAL := html

html: .venv/ready
	@$(NOX) html -- $(if $(PATTERN),'$(PATTERN)')

test test-all: .venv/ready
	@command -v chromium google-chrome >/dev/null \
		|| .venv/bin/python -m playwright install chromium \
		|| { echo $(NO_BROWSER); exit 1; }
	@$(NOX) $@ -- $(ARGS)

serve: .venv/ready
	@$(NOX) serve -- $(PORT)

record: .venv/ready
	@$(NOX) record -- $(PAGES) $(if $(MACHINE),--machine '$(MACHINE)')

audit: .venv/ready
	@$(NOX) audit -- $(PAGES)

html-noplot recordings linkcheck lint clean: .venv/ready
	@$(NOX) $@

help:
	@echo "make html                  execute what changed, build _build/html"
	@echo "make html PATTERN=regex    execute only the tutorials whose path matches"
	@echo "make html-noplot           build without executing"
	@echo "make record [PAGES=...]    execute pages, record them in recordings/"
	@echo "make recordings            show what is recorded where, and what is outdated"
	@echo "make test [ARGS=...]       lint, every page at small sizes; ARGS go to pytest"
	@echo "make test-all [ARGS=...]   every page at full size and in every form: long"
	@echo "make audit [PAGES=words]   Lighthouse and html-validate on _build/html (npx)"
	@echo "make serve [PORT=8000]     serve _build/html on this machine"
	@echo "make linkcheck             follow every external link (needs the network)"
	@echo "make lint                  check code, spelling and reStructuredText"
	@echo "make clean                 remove what is generated; .venv stays"

.venv/ready: requirements.txt requirements-tutorials.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and $(OLD_PYTHON) % v)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@
