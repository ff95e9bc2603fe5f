"""Every task of this repository, defined once. ``make help`` lists them.

All tasks run in one environment, the one that nox itself is installed in, because
torch is too large to install twice. ``make`` creates it from ``requirements.txt``.
"""

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"  # the environment that nox runs in
nox.options.error_on_external_run = False
nox.options.sessions = ["html"]

ROOT = Path(__file__).parent
TUTORIALS = ROOT / "tutorials"
BUILD = ROOT / "_build"
OLDEST_TORCH = (2, 11)
LARGEST_WHEELS = 50  # MiB


def sphinx(session, builder, outdir, *options):
    """Run sphinx-build with every warning an error; check torch before."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        session.error(
            f"{sys.executable} has no torch. 'make' installs it into .venv; with "
            "WHEELS, name a Python that has it: make record WHEELS=... PYTHON=..."
        )
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        session.error(
            f"torch {version} is too old: the tutorials need torch {oldest} or newer."
        )
    forget_deleted_tutorials()
    options = ["-n", "-W", "--keep-going", "-d", BUILD / "doctrees", *options]
    session.run(sys.executable, "-m", "sphinx", "-b", builder, *options, ROOT, outdir)


def forget_deleted_tutorials():
    """Remove what was generated from scripts that are gone."""
    for folder in [ROOT / "auto_tutorials", BUILD / "stage" / "auto_tutorials"]:
        for path in folder.glob("*/plot_*"):
            script = TUTORIALS / path.parent.name / f"{path.name.split('.')[0]}.py"
            if not script.exists():
                path.unlink()


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


def matching(session, pattern):
    """Tutorials whose path below tutorials/ matches the regular expression."""
    names = sorted(
        path.relative_to(TUTORIALS).as_posix() for path in TUTORIALS.rglob("plot_*.py")
    )
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as problem:
        session.error(f"PATTERN={pattern} is not a regular expression: {problem}")
    if not found:
        session.error(
            f"no tutorial matches PATTERN={pattern}. There are:\n  "
            + "\n  ".join(names)
        )
    return found


@nox.session
def html(session):
    """Execute what changed, build the site; -- PATTERN executes only what matches."""
    options = []
    if session.posargs:
        names = matching(session, session.posargs[0])
        wanted = "|".join(re.escape(f"/{name}") for name in names)
        options = [
            f"-Dsphinx_gallery_conf.filename_pattern=({wanted})$",
            "-Dsphinx_gallery_conf.run_stale_examples=True",
        ]
    sphinx(session, "html", BUILD / "stage", *options)
    publish(session)


@nox.session(name="html-noplot")
def html_noplot(session):
    """Build the site without executing anything."""
    sphinx(session, "html", BUILD / "stage", "-Dplot_gallery=0")
    publish(session)


@nox.session
def record(session):
    """Execute what changed, record it as this machine's; -- NAME names the machine."""
    name = session.posargs[0] if session.posargs else "auto"
    # All pages are read again (-E), in an environment apart from that of the pages.
    options = ["-E", "-d", BUILD / "record-doctrees", f"-Drecord_as={name}"]
    sphinx(session, "dummy", BUILD / "record", *options)


@nox.session
def recordings(session):
    """Show which tutorials are recorded on which machine, and which are outdated."""
    options = ["-E", "-d", BUILD / "record-doctrees", "-Drecordings_table=1"]
    sphinx(session, "dummy", BUILD / "record", "-q", "-Dplot_gallery=0", *options)


@nox.session
def unpack(session):
    """Check an archive that 'record' made elsewhere and put it into recordings/."""
    if not session.posargs:
        session.error("say which archive: make unpack ARCHIVE=nvidia-h100.tar.gz")
    session.run(sys.executable, "_ext/recording_files.py", session.posargs[0])


@nox.session
def wheels(session):
    """Collect wheels/ for recording without network; -- PYTHON-VERSION PROCESSOR."""
    version = session.posargs[0] if session.posargs else "3.12"
    processor = session.posargs[1] if len(session.posargs) > 1 else "x86_64"
    folder = ROOT / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [f"manylinux_2_{minor}_{processor}" for minor in (28, 27, 17, 12, 5)]
    # tutorials' own packages come without dependencies: torch is a gigabyte
    for wanted in ["requirements-record.txt", "requirements-tutorials.txt --no-deps"]:
        session.run(
            *[sys.executable, "-m", "pip", "download", "--disable-pip-version-check"],
            *["--only-binary=:all:", "--implementation=cp"],
            f"--python-version={version}",
            *[f"--platform={name}" for name in (*platforms, f"linux_{processor}")],
            *["--dest", folder, "-r", *wanted.split()],
        )
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    session.log(
        f"wheels/ has {size:.0f} MiB, for Python {version} on Linux {processor}"
    )
    if size > LARGEST_WHEELS:
        session.error(f"that is more than the {LARGEST_WHEELS} MiB that it may have")


@nox.session
def linkcheck(session):
    """Follow every external link (needs the network)."""
    sphinx(session, "linkcheck", BUILD / "linkcheck", "-Dplot_gallery=0")


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
def lint(session):
    """Check code, spelling and reStructuredText."""
    session.run(sys.executable, "-m", "ruff", "check")
    session.run(sys.executable, "-m", "ruff", "format", "--check")
    session.run(sys.executable, "-m", "codespell_lib")
    session.run(
        sys.executable,
        "-m",
        "sphinxlint",
        "--enable=all",
        "--disable=line-too-long",
        "index.rst",
        "tutorials",
    )


@nox.session
def test(session):
    """Lint, then every test; -- ARGS go to pytest."""
    lint(session)
    session.run(sys.executable, "-m", "pytest", *session.posargs)


@nox.session
def clean(session):
    """Remove everything that is generated. The environment .venv stays."""
    for folder in ["_build", "auto_tutorials", ".record", "wheels"]:
        shutil.rmtree(ROOT / folder, ignore_errors=True)
