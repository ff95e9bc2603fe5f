"""The commands, on a small made-up gallery: what they do and what they say."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import torch
from conftest import ROOT, environment, nox, run
from small import build, page, write_tutorial


def moment(site, name):
    """When the tutorial ran, as its page says; None if it shows no output."""
    found = re.search(rf"{name} ran at (\d+)", page(site, name))
    return found and int(found[1])


def test_build_pattern_and_noplot(small):
    done = nox("html", cwd=small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_build/html/index.html" in done.stderr, "it says how to open the site"
    first = {name: moment(small, name) for name in ["alpha", "beta"]}
    index = (small / "_build/html/index.html").read_text()
    assert 'alt="A line that rises from left to right, made up for a test."' in index

    assert nox("html", "--", "bet", cwd=small).returncode == 0
    assert moment(small, "alpha") == first["alpha"]
    assert moment(small, "beta") > first["beta"]

    assert nox("html-noplot", cwd=small).returncode == 0
    assert moment(small, "alpha") is None
    assert "built without running" in page(small, "alpha")
    assert "appears here after" in (small / "_build/html/index.html").read_text()

    assert build(small, "-Dplot_gallery=1").returncode == 0
    assert moment(small, "alpha") == first["alpha"], "the outputs come back"

    assert nox("clean", cwd=small).returncode == 0
    assert not (small / "_build").exists()
    assert not (small / "auto_tutorials").exists()


def test_deleted_tutorial_leaves_the_site(built):
    (built / "tutorials/basics/plot_beta.py").unlink()
    done = build(built)
    assert done.returncode == 0, done.output
    assert page(built, "alpha")
    assert not list((built / "_build/html/auto_tutorials").rglob("plot_beta*"))


def test_unknown_pattern_lists_the_tutorials(small):
    done = nox("html", "--", "gamma", cwd=small)
    assert done.returncode != 0
    for words in ["PATTERN=gamma", "basics/plot_alpha.py", "basics/plot_beta.py"]:
        assert words in done.stderr


def test_failing_tutorials_are_all_named_and_the_former_pages_stay(small):
    assert nox("html", cwd=small).returncode == 0
    before = page(small, "alpha"), page(small, "beta")
    write_tutorial(small, "alpha", code="raise ValueError('alpha is broken')")
    write_tutorial(small, "beta", code="assert 1 + 1 == 3, 'beta is wrong'")
    done = nox("html", cwd=small)
    assert done.returncode != 0
    for words in ["plot_alpha.py", "alpha is broken", "plot_beta.py", "beta is wrong"]:
        assert words in done.stdout + done.stderr
    assert (page(small, "alpha"), page(small, "beta")) == before


def test_figure_without_alternative_text_names_file_and_line(built):
    write_tutorial(built, "beta", label="")
    done = build(built)
    assert done.returncode != 0
    assert re.search(r"plot_beta\.py:\d+: .*alternative text", done.output)
    done = run(sys.executable, "runner.py", "--show", "plot_beta", cwd=built)
    assert re.search(r"plot_beta\.py:\d+: .*alternative text", done.stderr)


def test_page_whose_run_is_lost_fails_the_build(built):
    generated = built / "auto_tutorials" / "basics" / "plot_alpha.rst"
    text = generated.read_text()
    generated.chmod(0o644)
    generated.write_text(re.sub(r"\.\. rst-class:: sphx-glr-timing\n\n.*\n", "", text))
    done = build(built)
    assert done.returncode != 0
    assert re.search("plot_alpha.*the tutorial did not run", done.output)


def test_two_pages_of_one_name_are_refused(built):
    folder = built / "tutorials" / "speed"
    folder.mkdir()
    (folder / "GALLERY_HEADER.rst").write_text("Speed\n=====\n\nText.\n")
    write_tutorial(built, "alpha").rename(folder / "plot_beta.py")
    write_tutorial(built, "alpha")
    done = build(built)
    assert done.returncode != 0
    assert "two tutorials have the same file name: ['plot_beta']" in done.output


def test_new_title_reaches_the_pages_that_link_to_it(built):
    beta = built / "tutorials/basics/plot_beta.py"
    beta.write_text(
        beta.read_text().replace("Text before", "See ``plot_alpha.py``. It")
    )
    assert build(built).returncode == 0
    write_tutorial(built, "alpha")
    alpha = built / "tutorials/basics/plot_alpha.py"
    alpha.write_text(
        alpha.read_text().replace("alpha\n=====", "A new title\n===========")
    )
    done = build(built)
    assert done.returncode == 0, done.output
    assert "A new title</a>. It code" in page(built, "beta")


def test_no_state_passes_from_one_tutorial_to_the_next(small):
    states = [
        "torch.is_grad_enabled()",
        "torch.get_default_dtype()",
        "torch.get_num_threads()",
        "torch.backends.cudnn.conv.fp32_precision",
        "torch.are_deterministic_algorithms_enabled()",
        "torch.initial_seed()",
        "plt.rcParams['lines.linewidth']",
        "len(os.listdir(os.environ['TORCHINDUCTOR_CACHE_DIR']))",
    ]
    show = "import os, sys, torch\n"
    show += "\n".join(f"print('state:', {state})" for state in states)
    disturb = """
print("a library's chatter", file=sys.stderr)
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.use_deterministic_algorithms(True)
torch.manual_seed(7)
plt.rcParams["lines.linewidth"] = 9
open(os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/compiled", "w").close()
"""
    write_tutorial(small, "alpha", code=show + disturb)
    write_tutorial(small, "beta", code=show)
    (small / "tutorials/basics/helper.py").write_text("'''No page.'''\n")
    done = build(small)
    assert done.returncode == 0, done.output
    seen = {
        name: re.findall(r"state: .*", page(small, name)) for name in ["alpha", "beta"]
    }
    assert len(seen["alpha"]) == len(states)
    assert seen["alpha"] == seen["beta"]
    output = page(small, "alpha").rpartition('class="sphx-glr-script-out')[2]
    assert "chatter" not in output, "stderr stands on no page"
    assert "a library's chatter" in done.output, "and is not lost"


def test_interrupted_build_continues(small):
    started = small / "started"
    wait = f"from pathlib import Path\nif not Path({str(started)!r}).exists():\n"
    wait += f"    Path({str(started)!r}).touch()\n    time.sleep(120)"
    write_tutorial(small, "beta", code=wait)
    with subprocess.Popen(
        [sys.executable, "-m", "nox", "-s", "html"],
        cwd=small,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A test that itself runs in the background would hand on a deaf ear for Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        until = time.monotonic() + 60
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode != 0
    assert not (small / "_build" / "html").exists()

    alpha = small / "auto_tutorials" / "basics" / "plot_alpha.rst"
    ran = re.search(r"alpha ran at (\d+)", alpha.read_text())[1]
    done = build(small)
    assert done.returncode == 0, done.output
    assert moment(small, "alpha") == int(ran), "a finished tutorial ran again"
    assert moment(small, "beta")


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
    models = [torch.nn.Linear(6, 3) for _ in range(5)]
    minibatches = torch.randn(5, 8, 6)
    names = {"models": models, "minibatches": minibatches, "minibatch": minibatches[0]}
    exec(code, names)
    loop = torch.stack([model(minibatches[0]) for model in models])
    torch.testing.assert_close(names["logits"], loop)
    own = names["vmap"](names["predict"])(names["params"], {}, minibatches)
    loop = [model(x) for model, x in zip(models, minibatches, strict=True)]
    torch.testing.assert_close(own, torch.stack(loop))
