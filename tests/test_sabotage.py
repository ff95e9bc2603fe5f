"""Every check on a page can fail: break what it checks and see the page stop."""

import sys

import pytest
from conftest import TUTORIALS, name_of, run

# Faults that only some pages guard against, beside those that all must notice:
# name of the page -> fault (see outside/sitecustomize.py) -> words of the message.
MORE = {
    "basics/plot_ensembling": {
        "disturb@1": "option 1, ieee: vmap does not compute",
        "disturb@2": "option 2, ieee: vmap does not compute",
        "accept": "PyTorch ran a call",
    },
    "speed/plot_when_vmap_pays": {
        "disturb@2": "MLP: vmap does not compute",  # the gradients
        "disturb@3": "CNN: vmap does not compute",
        "disturb@129": "stacked in every call: vmap does not compute",
    },
    "speed/plot_what_vmap_runs": {
        "disturb@2": "conv1, shared input: vmap does not compute",
        "loop": "expected one convolution for all models, found 4",
        "spread@9": "conv1, shared input: expected",
        "loop@16": "vmap, forward: not a straight line",
        "loop@19": "vmap: the profiler saw convolutions with groups",
        "disturb@27": "GRUCell: vmap is",
        "again@27": "a fallback runs more operators for more models",
        "accept": "PyTorch ran a call",
    },
    "speed/plot_fastest_ensemble": {
        "disturb@3": "vmap, in place, chunks, float32, option 1: a logit is",
        "disturb@4": "vmap, float32, option 2: a logit is",
        "accept": "PyTorch ran a call",
    },
    "speed/plot_how_equal": {
        "wrongloop": "the error of the loop",
        "strict": "the tolerance refuses vmap",
        "blind": "the tolerance accepts exchanged members",
        "lenient": "the tolerance accepts a wrong weight",
        "argmin": "although its margin is larger than twice the error",
        "stuck": "left ('ieee', 'ieee', True), found",
    },
    "speed/plot_memory": {
        "loop": "the ruler is wrong, or vmap does not work on all rows at once",
        "wrongstack": "filled and copied conv1.weight differ",
        "copyload": "is a copy of row 1 of the stack, not a window",
        "hoard": "memory of 30.00 models instead of 20",
        "disturb@4": "not what the modules compute in float64",
        "swap@5": "not what the modules compute in float64",
        "loop@6": "bytes at the peak, the forecast says",
        "loop@43": "were to be the most that fit",
        "nochunk@44": "were to be the most that fit",
        "forget@50": "no longer saves all activations",
        "nochunk@51": "chunks with grad inside need as much",
    },
}
CASES = [(name, fault, words) for name in MORE for fault, words in MORE[name].items()]


def sabotage(tutorial, fault, folder):
    """Run the tutorial with a fault; return what its assertion says."""
    done = run(sys.executable, tutorial, cwd=folder, SABOTAGE=fault)
    assert done.returncode != 0, f"{tutorial.name} did not notice {fault}"
    assert str(tutorial) in done.stderr, done.stderr
    last = [line for line in done.stderr.splitlines() if line and line[0] != " "][-1]
    assert last.startswith("AssertionError: "), done.stderr
    return done.stderr


@pytest.mark.parametrize("fault", ["disturb", "swap"])
def test_page_notices(tutorial, fault, tmp_path):
    sabotage(tutorial, fault, tmp_path)


@pytest.mark.parametrize(("name", "fault", "words"), CASES)
def test_each_check_notices(name, fault, words, tmp_path):
    (tutorial,) = [path for path in TUTORIALS if name_of(path) == name]
    assert words in sabotage(tutorial, fault, tmp_path)
