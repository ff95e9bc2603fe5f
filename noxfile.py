"""Every task of this repository, defined once. ``make help`` lists them.

All tasks run in one environment, the one that nox itself is installed in, because
torch is too large to install twice. ``make`` creates it from ``requirements.txt``.
"""

import shutil
import sys
from pathlib import Path

import nox

import runner

nox.options.default_venv_backend = "none"  # the environment that nox runs in
nox.options.error_on_external_run = False
nox.options.sessions = ["html"]

ROOT = Path(__file__).parent
BUILD = ROOT / "_build"


def sphinx_options(builder):
    """Options of sphinx-build: every warning is an error, all of them are shown."""
    return ["-b", builder, "-n", "-W", "--keep-going", "-d", "_build/doctrees"]


def sphinx(session, builder, outdir, *options):
    if trouble := runner.torch_trouble():
        session.error(trouble)
    with session.chdir(ROOT):
        command = [sys.executable, "-m", "sphinx", *sphinx_options(builder)]
        session.run(*command, *options, ".", outdir)


def publish(session):
    """Put the finished pages in _build/html; until here the former ones stay."""
    html, new, old = BUILD / "html", BUILD / "html.new", BUILD / "html.old"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(BUILD / "stage", new)
    if html.exists():
        shutil.rmtree(old, ignore_errors=True)
        html.rename(old)
    new.rename(html)
    shutil.rmtree(old, ignore_errors=True)
    session.log(f"The site is ready: {(html / 'index.html').as_uri()} (or: make serve)")


@nox.session
def html(session):
    """Execute what changed, build the site; -- PATTERN executes only what matches."""
    session.run(sys.executable, "runner.py", "--build", *session.posargs)
    sphinx(session, "html", "_build/stage")
    publish(session)


@nox.session(name="html-noplot")
def html_noplot(session):
    """Build the site without executing anything."""
    sphinx(session, "html", "_build/stage")
    publish(session)


@nox.session
def record(session):
    """Execute pages and record them as this machine's; -- PAGES and options."""
    session.run(sys.executable, "runner.py", *session.posargs)


@nox.session
def recordings(session):
    """Show which pages are recorded on which machine, and which are outdated."""
    session.run(sys.executable, "runner.py", "--table")


@nox.session
def linkcheck(session):
    """Follow every external link (needs the network)."""
    sphinx(session, "linkcheck", "_build/linkcheck")


@nox.session
def serve(session):
    """Serve _build/html on this machine; -- PORT chooses the port."""
    port = session.posargs[0] if session.posargs else "8000"
    if not (BUILD / "html").exists():
        session.error("there is no _build/html yet. Run 'make html' first.")
    session.run(
        *[sys.executable, "-m", "http.server", "--bind", "127.0.0.1"],
        *["--directory", str(BUILD / "html"), port],
    )


@nox.session
def audit(session):
    """Lighthouse and html-validate on _build/html (needs npx); -- words of pages."""
    session.run(sys.executable, "tests/audit.py", *session.posargs)


@nox.session
def lint(session):
    """Check code, spelling, reStructuredText and the settings of hosts."""
    session.run(sys.executable, "-m", "ruff", "check")
    session.run(sys.executable, "-m", "ruff", "format", "--check")
    session.run(sys.executable, "-m", "codespell_lib")
    rst = ["--enable=all", "--disable=line-too-long", "index.rst", "tutorials"]
    session.run(sys.executable, "-m", "sphinxlint", *rst)
    workflows = sorted(str(path) for path in Path(".github/workflows").glob("*.yml"))
    schemas = {"github-workflows": workflows, "readthedocs": [".readthedocs.yaml"]}
    for schema, files in schemas.items():
        check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
        session.run(*check, f"vendor.{schema}", *files)


@nox.session
def test(session):
    """Lint, then every page once and what must hold; -- ARGS go to pytest."""
    lint(session)
    session.run(sys.executable, "-m", "pytest", *session.posargs)


@nox.session(name="test-all")
def test_all(session):
    """Every page at full size and in every form, every proof; -- ARGS go to pytest."""
    lint(session)
    needs = "requirements-test-all.txt"
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "-r", needs)
    session.run(sys.executable, "-m", "pytest", "--all", *session.posargs)


@nox.session
def clean(session):
    """Remove everything that is generated. The environment .venv stays."""
    for folder in ["_build", "auto_tutorials"]:
        shutil.rmtree(ROOT / folder, ignore_errors=True)
