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
    "training/plot_training": {
        "disturb@2": "grad_and_value: losses or gradients are not",
        "tired@1": "SGD with momentum, float64: a weight trained together is",
        "wild": "SGD with momentum: float64 proves nothing",
        "noclip": "one clip for all leaves 100% of another member's gradient",
        "nomean": "the mean of the losses does not change the rule",
        "disturb@6": "clipping under vmap is not clipping each model alone",
        "disturb@28": "stacking in the loop: the losses move",
        "disturb@40": "compiled, 10 models: a gradient is",
    },
    "training/plot_hyperparameter_sweep": {
        "coupled": "vmap and torch.optim after 20 steps:",
        "disturb@3": "scores: member 0 alone has another score",
        "disturb@5": "PBT and its replay by torch.optim:",
        "swap@6": "PBT and its replay by torch.optim:",
        "coarse": "times as far from float64 as torch.optim",
        "anyoptimizer": "torch.optim takes what this page says it refuses",
        "descending": "PBT: a member copied a worse one",
    },
    "training/plot_saving": {
        "disturb@2": "own data: not what a loop",
        "wrongstack": "shared data: not what a loop",
        "stay": "did not move to the CPU",
        "lazy": "some member did not learn",
        "wrongclone": "in and out again: member 0 is not the expected model",
        "disturb@83": "trained, member(i): not what a loop",
        "window": "a member overwritten: member 0 is not",
        "untie": "a tie is lost",
        "wrongload": "saved and loaded: member 0 is not",
        "disturb@84": "loaded: other predictions",
        "forgetful": "loaded: exp_avg of the optimizer has other bits",
        "wrongcheckpoint": "from checkpoints: member 0 is not",
        "readonly": "drop, add, replace: member 0 is not",
        "haunt": "old optimizer, one step: member 0 is not",
        "disturb@100": "after drop(1), the others learn something else",
        "blindfold": "the message does not name",
        "unstrict": "missing name: the message does not name",
        "disturb@106": "tensordict: not what a loop",
        "disturb@107": "loads what it saved: not true of Ensemble",
        "disturb@110": "tensordict: other predictions",
        "wrongmean": "is not the mean of the members",
        "wrongprogram": "has other bits",
        "disturb@113": "exported: other predictions",
        "anysize": "a program for 64 rows took 7",
        "fixedsize": "no batch size of its own",
        "disturb@118": "exported for any batch size: wrong for 7",
        "disturb@120": "bare vmap, 5 members: other predictions",
    },
    "training/plot_state": {
        "fastsgd": "trained fc1.weight: vmap does not compute",
        "stale@1": "updated norm.running_mean: vmap does not compute",
        "shift@1": "logits of the last step: vmap does not compute",
        "accept": "1. one row: this ran",
        "stale@3": "left the statistics alone",
        "disturb@4": "eval mode, logits: vmap does not compute",
        "noeval": "eval mode, norm.running_mean: vmap does not compute",
        "disturb@6": "scale in a buffer, outputs: vmap does not compute",
        "accept@7": "momentum=None: this ran",
        "stale@8": "own momentum, norm.running_mean: vmap does not compute",
        "again@9": "changed in place, mean: vmap does not compute",
        "handback@14": "one dictionary, two, vmap have new values",
        "accept@15": "default: this ran",
        "manymasks": "'same' drew different masks",
        "onemask": "'different' drew one mask",
        "noseed": "'different' did not repeat itself",
        "late@16": "does not repeat the seeded loop",
        "disturb@22": "masks as an argument, outputs: vmap does not compute",
        "nogenerator": "member 2 alone, outputs: vmap does not compute",
        "disturb@23": "built on meta, logits: vmap does not compute",
        "keeptie": "the copy kept its tie",
        "accept@25": "strict: this ran",
        "lax": "no model, stack_module_state: this ran",
        "stubborn": "attributes: this ran",
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
