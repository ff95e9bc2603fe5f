"""Small made-up sites: two tutorials in place of the repository's own."""

import shutil

import pytest
import warm
from conftest import copy_repository

import noxfile

SMALL_TUTORIAL = '''"""
{title}
=====

The {title} of this small gallery draws one line and prints when it ran.
"""

# %%
# Text before code.

import time
import matplotlib.pyplot as plt
{code}
print("{title} ran at", time.time_ns())
fig, ax = plt.subplots()
_ = ax.plot([1, 2])
{label}
'''
LABEL = 'fig.set_label("A line that rises from left to right, made up for a test.")'


def write_tutorial(site, name, code="", label=LABEL):
    """Write a tutorial of one code cell into a small site."""
    path = site / "tutorials" / "basics" / f"plot_{name}.py"
    path.write_text(SMALL_TUTORIAL.format(title=name, code=code, label=label))
    return path


def make_small(folder):
    """Copy the repository with two small tutorials in place of its own."""
    site = copy_repository(folder, ["tutorials/", "recordings/", "index.rst"])
    for name in ["tutorials", "tutorials/basics"]:
        (site / name).mkdir(parents=True)
        (site / name / "GALLERY_HEADER.rst").write_text("Title\n=====\n\nText.\n")
    for name in ["alpha", "beta"]:
        write_tutorial(site, name)
    (site / "index.rst").write_text(
        "Small\n=====\n\nHere is text.\n\n"
        ".. tutorial-figure:: basics/plot_alpha 1\n\n"
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
def small(tmp_path):
    return make_small(tmp_path / "site")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    site = make_small(tmp_path_factory.mktemp("built") / "site")
    done = build(site)
    assert done.returncode == 0, done.output
    return site


@pytest.fixture
def built(built_once, tmp_path):
    """A small site that is built, for a test to change."""
    return shutil.copytree(built_once, tmp_path / "site")
