"""The commands, on a small made-up gallery: what they do and what they say."""

import re
import shutil
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, nox, run
from small import build, page, write_tutorial
from sphinx.errors import ExtensionError

import runner
from _ext import gallery


def test_the_site_is_executed_built_and_cleaned(small):
    """make html from a fresh clone of two pages, one of which fails at first."""
    shutil.rmtree(small / "_build")
    write_tutorial(small, "beta", label="")
    done = nox("html", cwd=small)
    assert done.returncode != 0
    assert re.search(
        r"plot_beta\.py:\d+: .*alternative text", done.stdout + done.stderr
    )
    assert not (small / "_build" / "html").exists()

    write_tutorial(small, "beta")
    done = nox("html", cwd=small)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout + done.stderr
    assert "[1/1] basics/plot_beta" in told, "alpha is done"
    assert "_build/html/index.html" in told, "it says how to open the site"
    for name in ["alpha", "beta"]:
        assert f"{name} ran at" in page(small, name)

    assert nox("clean", cwd=small).returncode == 0
    assert not (small / "_build").exists()
    assert not (small / "auto_tutorials").exists()


def test_a_warning_fails_the_build(built):
    write_tutorial(built, "alpha", text="See ``plot_nowhere.py``.")
    done = build(built)
    assert done.returncode != 0
    assert "there is no tutorial plot_nowhere.py to link to" in done.output


def test_deleted_tutorials_leave_the_site_two_of_one_name_are_refused(
    built, monkeypatch
):
    monkeypatch.setattr(runner, "TUTORIALS", built / "tutorials")
    app = SimpleNamespace(srcdir=built, outdir=built / "_build/html")
    (built / "tutorials/basics/plot_beta.py").unlink()
    gallery.forget_deleted(app)
    for folder in [app.srcdir, app.outdir]:
        left = (folder / "auto_tutorials/basics").glob("plot_*")
        assert {path.name.partition(".")[0] for path in left} == {"plot_alpha"}
    (built / "tutorials/speed").mkdir()
    (built / "tutorials/speed/plot_alpha.py").touch()
    with pytest.raises(ExtensionError, match=r"same file name: \['plot_alpha'\]"):
        gallery.forget_deleted(app)


def test_python_that_is_too_old_is_told_in_one_line(small, tmp_path):
    old = tmp_path / "python3.10"
    old.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "sys.version_info = (3, 10, 4, 'final', 0)\nexec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    done = run("make", "html", f"PYTHON={old}", cwd=small)
    assert done.returncode != 0
    assert "is Python 3.10; this site needs 3.11 or newer" in done.stderr
    assert not (small / ".venv").exists()


def test_torch_that_is_too_old_is_told_in_one_line(small, tmp_path):
    metadata = tmp_path / "torch-2.5.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    for command in [["runner.py", "plot_alpha"], ["-m", "nox", "-s", "html"]]:
        done = run(sys.executable, *command, cwd=small, PYTHONPATH=str(tmp_path))
        assert done.returncode != 0
        told = "torch 2.5.1 is too old: pages need 2.11 or newer"
        assert told in done.stdout + done.stderr


def test_missing_browser_is_told_in_one_line(small, tmp_path):
    """Where neither Chromium is there nor Playwright's download can be reached."""
    python = small / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    (small / ".venv" / "ready").touch()
    for tool in ["make", "sh"]:
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = run("make", "test", cwd=small, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "Install it: apt install chromium" in done.stdout


def test_help_names_every_task(small):
    listed = run("make", "help", cwd=small).stdout
    phony = re.search(r"^.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    tasks = set(phony[1].replace("\\", " ").split()) - {"help"}
    assert len(tasks) > 8
    for task in tasks:
        assert f"make {task}" in listed


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (ROOT / link).exists(), f"README.md: {link}"


def test_the_lines_of_the_readme_and_the_landing_page_are_the_same_and_run():
    readme, landing = (ROOT / name for name in ("README.md", "index.rst"))
    code = readme.read_text().split("```python\n")[1].split("```")[0]
    assert textwrap.indent(code, "   ") in landing.read_text()
    names = {}
    exec(code, names)
    models, x = names["models"], names["x"]
    own = [model(row) for model, row in zip(models, x, strict=True)]
    torch.testing.assert_close(names["logits"], torch.stack(own))
    same = torch.stack([model(x[0]) for model in models])
    torch.testing.assert_close(names["same"], same)
