"""Small made-up sites, built in a warm process: two tutorials stand for all.

Both ran on the machine that builds the site, alpha on an imaginary GPU, too.
Beta refers to alpha. Nobody executed them: their outputs are made up.
"""

import shutil

import pytest
import warm
from conftest import copy_repository, imagine

import noxfile
import runner

RUNS = "../_build/runs/here"  # beside recordings/

SMALL_TUTORIAL = '''"""
{title}
=====

The {title} of this small gallery `draws <https://pytorch.org>`_ :math:`x^2`.
"""

# %%
# {text}

import time
import matplotlib.pyplot as plt
{code}
x = 1
print("{title} ran at", time.time_ns())

# %%
# Second
# ------

fig, ax = plt.subplots()
_ = ax.plot([1, 2])
{label}

# %%
# Third
# -----

print(f"x is {{x}}")
'''
LABEL = 'fig.set_label("A line that rises.")'


def write_tutorial(site, name, code="", label=LABEL, text="See ``plot_alpha.py``."):
    """Write a tutorial of three cells into a small site: it prints, draws, prints."""
    path = site / "tutorials" / "basics" / f"plot_{name}.py"
    path.write_text(
        SMALL_TUTORIAL.format(title=name, code=code, label=label, text=text)
    )
    return path


def make_small(folder):
    """Copy the repository with two small tutorials in place of its own."""
    site = copy_repository(folder, ["tutorials/", "recordings/", "index.rst"])
    for name in ["tutorials", "tutorials/basics"]:
        (site / name).mkdir(parents=True)
        (site / name / "GALLERY_HEADER.rst").write_text("Title\n=====\n\nText.\n")
    for name in ["alpha", "beta"]:
        write_tutorial(site, name)
    imagine(site, "basics/plot_alpha", say="x is 1\n")
    for name in ["alpha", "beta"]:
        imagine(site, f"basics/plot_{name}", runner.this_machine(), RUNS, "x is 1\n")
    (site / "index.rst").write_text(
        "Small\n=====\n\nHere is text.\n\n"
        ".. tutorial-figure:: basics/plot_alpha 1\n\n"
        ".. tutorial-figure:: basics/plot_beta 1\n\n"
        ".. toctree::\n\n   auto_tutorials/index\n"
    )
    return site


def build(site, *options):
    """Build a small site as ``make html`` does, in a warm process."""
    return warm.build(
        site, [*noxfile.sphinx_options("html"), *options, ".", "_build/html"]
    )


def page(site, name):
    """The built page of a small tutorial."""
    path = site / "_build" / "html" / "auto_tutorials" / "basics" / f"plot_{name}.html"
    return path.read_text()


@pytest.fixture
def alpha(tmp_path, monkeypatch):
    """The script of one page of three cells, in a repository of its own."""
    for name, below in [("TUTORIALS", "tutorials"), ("RECORDINGS", "recordings")]:
        monkeypatch.setattr(runner, name, tmp_path / below)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "RUNS", tmp_path / "_build" / "runs")
    (tmp_path / "tutorials/basics").mkdir(parents=True)
    return write_tutorial(tmp_path, "alpha")


@pytest.fixture
def small(tmp_path):
    return make_small(tmp_path / "site")


@pytest.fixture(scope="session")
def built_once(once):
    def build_it(site):
        make_small(site)
        done = build(site)
        assert done.returncode == 0, done.output

    return once("small", build_it)


@pytest.fixture
def built(built_once, tmp_path):
    """A small site that is built, for a test to change."""
    return shutil.copytree(built_once, tmp_path / "site")
