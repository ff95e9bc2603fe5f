"""The commands, on a small made-up gallery: what they do and what they say."""

import os
import re
import signal
import subprocess
import sys
import time

from conftest import ROOT, environment, page, run, write_tutorial
from conftest import small_nox as nox


def moment(site, name):
    """When the tutorial ran, as its page says; None if it shows no output."""
    found = re.search(rf"{name} ran at (\d+)", page(site, name))
    return found and int(found[1])


def test_build_rebuild_pattern_and_noplot(small):
    done = nox("html-noplot", cwd=small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert moment(small, "alpha") is None
    assert "built without running" in page(small, "alpha")
    assert "appears here after" in (small / "_build/html/index.html").read_text()

    done = nox("html", cwd=small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_build/html/index.html" in done.stderr, "it says how to open the site"
    assert "successfully executed 2 out of 2" in done.stdout
    first = {name: moment(small, name) for name in ["alpha", "beta"]}
    index = (small / "_build/html/index.html").read_text()
    assert 'alt="A line that rises from left to right, made up for a test."' in index

    assert nox("html", cwd=small).returncode == 0
    assert {name: moment(small, name) for name in first} == first, "nothing changed"

    assert nox("html", "--", "bet", cwd=small).returncode == 0
    assert moment(small, "alpha") == first["alpha"]
    assert moment(small, "beta") > first["beta"]

    assert nox("html-noplot", cwd=small).returncode == 0
    assert moment(small, "beta") is None  # test_recordings.py sees it come back


def test_deleted_tutorial_leaves_the_site(built):
    (built / "tutorials/basics/plot_beta.py").unlink()
    done = nox("html", cwd=built)
    assert done.returncode == 0, done.stdout + done.stderr
    assert page(built, "alpha")
    assert not list((built / "_build/html/auto_tutorials").rglob("plot_beta*"))


def test_unknown_pattern_lists_the_tutorials(small):
    done = nox("html", "--", "gamma", cwd=small)
    assert done.returncode != 0
    for words in ["PATTERN=gamma", "basics/plot_alpha.py", "basics/plot_beta.py"]:
        assert words in done.stderr
    done = nox("html", "--", "(", cwd=small)
    assert done.returncode != 0
    assert "not a regular expression" in done.stderr


def test_failing_tutorials_are_all_named_and_the_former_pages_stay(built):
    before = page(built, "alpha"), page(built, "beta")
    write_tutorial(built, "alpha", code="raise ValueError('alpha is broken')")
    write_tutorial(built, "beta", code="assert 1 + 1 == 3, 'beta is wrong'")
    done = nox("html", cwd=built)
    assert done.returncode != 0
    for words in ["plot_alpha.py", "alpha is broken", "plot_beta.py", "beta is wrong"]:
        assert words in done.stdout + done.stderr
    assert (page(built, "alpha"), page(built, "beta")) == before


def test_figure_without_alternative_text_names_file_and_line(small):
    write_tutorial(small, "beta", label="")
    done = nox("html", cwd=small)
    assert done.returncode != 0
    assert re.search(
        r"plot_beta\.py:\d+: .*alternative text", done.stdout + done.stderr
    )


def test_page_whose_run_is_lost_fails_the_build(built):
    generated = built / "auto_tutorials" / "basics" / "plot_alpha.rst"
    text = generated.read_text()
    generated.chmod(0o644)
    generated.write_text(re.sub(r"\.\. rst-class:: sphx-glr-timing\n\n.*\n", "", text))
    done = nox("html", cwd=built)
    assert done.returncode != 0
    assert re.search("plot_alpha.*the tutorial did not run", done.stdout + done.stderr)


def test_no_state_passes_from_one_tutorial_to_the_next(small):
    states = [
        "torch.is_grad_enabled()",
        "torch.get_default_dtype()",
        "torch.get_num_threads()",
        "torch.backends.cudnn.conv.fp32_precision",
        "torch.are_deterministic_algorithms_enabled()",
        "torch.initial_seed()",
        "plt.rcParams['lines.linewidth']",
    ]
    show = "import torch\n" + "\n".join(f"print('state:', {state})" for state in states)
    disturb = """
import torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.use_deterministic_algorithms(True)
torch.manual_seed(7)
plt.rcParams["lines.linewidth"] = 9
"""
    write_tutorial(small, "alpha", code=show + disturb)
    write_tutorial(small, "beta", code=show)
    done = nox("html", cwd=small)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {
        name: re.findall(r"state: .*", page(small, name)) for name in ["alpha", "beta"]
    }
    assert len(seen["alpha"]) == len(states)
    assert seen["alpha"] == seen["beta"]


def test_interrupted_build_continues(small):
    started = small / "started"
    wait = f"from pathlib import Path\nif not Path({str(started)!r}).exists():\n"
    wait += f"    Path({str(started)!r}).touch()\n    time.sleep(120)"
    write_tutorial(small, "beta", code=wait)
    with subprocess.Popen(
        [sys.executable, "-m", "nox", "-s", "html"],
        cwd=small,
        env=environment(PYTHONPATH=""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A test that itself runs in the background would hand on a deaf ear for Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as build:
        until = time.monotonic() + 60
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(build.pid, signal.SIGINT)
    assert build.returncode != 0
    assert not (small / "_build" / "html").exists()

    alpha = small / "auto_tutorials" / "basics" / "plot_alpha.rst"
    ran = re.search(r"alpha ran at (\d+)", alpha.read_text())[1]
    done = nox("html", cwd=small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert moment(small, "alpha") == int(ran), "a finished tutorial ran again"
    assert moment(small, "beta")


def test_torch_that_is_too_old_is_told_in_one_line(small, tmp_path):
    metadata = tmp_path / "torch-2.5.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    done = nox("html", cwd=small, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert (
        "torch 2.5.1 is too old: the tutorials need torch 2.11 or newer" in done.stderr
    )


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


def test_help_names_every_task(small):
    listed = run("make", "help", cwd=small).stdout
    phony = re.search(r"^.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    tasks = set(phony[1].replace("\\", " ").split()) - {"help"}
    assert len(tasks) > 8
    for task in tasks:
        assert f"make {task}" in listed


def test_clean_removes_what_is_generated(small):
    assert nox("html-noplot", cwd=small).returncode == 0
    assert nox("clean", cwd=small).returncode == 0
    assert not (small / "_build").exists()
    assert not (small / "auto_tutorials").exists()


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (ROOT / link).exists(), f"README.md: {link}"
