"""The commands, on a small made-up gallery: what they do and what they say."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import warm
from conftest import ROOT, environment, run
from docutils import nodes
from small import build, page, write_tutorial
from sphinx.errors import ExtensionError

import noxfile
import runner
from _ext import gallery, page_links


@pytest.fixture
def task(monkeypatch):
    """Do a task of the noxfile in a small site, Sphinx in a warm process.

    What fails is raised; else what the task says is returned.
    """

    def stop(text):
        raise RuntimeError(text)

    def do(site, name, *arguments):
        for constant, folder in [("ROOT", ""), ("TUTORIALS", "tutorials")]:
            monkeypatch.setattr(noxfile, constant, site / folder)
        monkeypatch.setattr(noxfile, "BUILD", site / "_build")

        def run_sphinx(*command):
            done = warm.build(site, command[3:])  # after python -m sphinx
            if done.returncode:
                stop(done.output)

        session = MagicMock(posargs=arguments)
        session.run, session.error = run_sphinx, stop
        getattr(noxfile, name)(session)
        return str(session.log.call_args)

    return do


def moment(site, name):
    """When the tutorial ran, as its page says; None if it shows no output."""
    found = re.search(rf"{name} ran at (\d+)", page(site, name))
    return found and int(found[1])


def test_noplot_pattern_and_clean(built, task):
    first = {name: moment(built, name) for name in ["alpha", "beta"]}
    index = built / "_build/html/index.html"
    assert 'alt="A line that rises."' in index.read_text()
    assert "appears here after" not in index.read_text()

    task(built, "html_noplot")
    assert moment(built, "alpha") is moment(built, "beta") is None
    assert "built without running" in page(built, "beta")
    assert "appears here after" in index.read_text()

    says = task(built, "html", "bet")
    assert "_build/html/index.html" in says, "it says how to open the site"
    assert moment(built, "alpha") == first["alpha"], "its outputs come back"
    assert moment(built, "beta") > first["beta"]

    task(built, "clean")
    assert not (built / "_build").exists()
    assert not (built / "auto_tutorials").exists()


def test_unknown_pattern_lists_the_tutorials(small, task):
    with pytest.raises(RuntimeError) as raised:
        task(small, "html", "gamma")
    for words in ["PATTERN=gamma", "basics/plot_alpha.py", "basics/plot_beta.py"]:
        assert words in str(raised.value)


def test_failing_tutorials_are_all_named_and_the_former_pages_stay(built, task):
    before = page(built, "alpha"), page(built, "beta")
    write_tutorial(built, "alpha", code="raise ValueError('alpha is broken')")
    write_tutorial(built, "beta", label="")
    with pytest.raises(RuntimeError) as raised:
        task(built, "html")
    assert "plot_alpha.py" in str(raised.value)
    assert "alpha is broken" in str(raised.value)
    assert re.search(r"plot_beta\.py:\d+: .*alternative text", str(raised.value))
    assert (page(built, "alpha"), page(built, "beta")) == before


def test_each_warning_fails_the_build_and_the_others_are_told(built):
    write_tutorial(built, "alpha", text="See ``plot_nowhere.py``.")
    generated = built / "auto_tutorials/basics/plot_beta.rst"
    text = generated.read_text()
    generated.chmod(0o644)
    generated.write_text(re.sub(r"\.\. rst-class:: sphx-glr-timing\n\n.*\n", "", text))
    done = build(built)
    assert done.returncode != 0
    assert "there is no tutorial plot_nowhere.py to link to" in done.output
    assert re.search("plot_beta.*the tutorial did not run", done.output)


def test_a_new_title_reaches_the_pages_that_link_to_it(built_once):
    assert re.search(
        r"See <a [^>]*plot_alpha.html[^>]*>alpha</a>", page(built_once, "beta")
    )
    env = SimpleNamespace(titles={}, found_docs={"alpha", "beta"})
    written_again = []
    for title in ["alpha", "A new title", "A new title"]:
        env.titles["alpha"] = nodes.title("", title)
        written_again += [page_links.write_all_after_a_new_title(None, env)]
    assert list(map(sorted, written_again)) == [[], ["alpha", "beta"], []]


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


SHOW = """
import os, sys, torch
states = [
    torch.is_grad_enabled(),
    torch.get_default_dtype(),
    torch.get_num_threads(),
    torch.backends.cudnn.conv.fp32_precision,
    torch.are_deterministic_algorithms_enabled(),
    torch.initial_seed(),
    plt.rcParams["lines.linewidth"],
    os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]),
]
print("states:", states)
"""
DISTURB = """
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


def test_no_state_passes_from_one_tutorial_to_the_next(built):
    write_tutorial(built, "alpha", code=SHOW + DISTURB)
    write_tutorial(built, "beta", code=SHOW)
    (built / "tutorials/basics/helper.py").write_text("'''No page.'''\n")
    done = build(built)
    assert done.returncode == 0, done.output
    alpha, beta = page(built, "alpha"), page(built, "beta")
    shown = [re.findall(r"states: \[.*", text) for text in (alpha, beta)]
    assert len(shown[0]) == 1
    assert shown[0] == shown[1]
    output = alpha.partition('class="sphx-glr-script-out')[2]
    assert "chatter" not in output, "stderr stands on no page"
    assert "a library's chatter" in done.output, "and is not lost"


def test_interrupted_build_continues(small, task):
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
    task(small, "html")
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
