"""What plot_what_vmap_runs.py says of operators: which ones run, and how many."""

import math
import platform
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pages import functions_of, names_of, text_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE = names_of("speed/plot_what_vmap_runs", "Operators", "make_cnn")
Operators, make_cnn = PAGE["Operators"], PAGE["make_cnn"]


def calls_of(seen, name):
    """What the page would print of this operator: its shapes and groups."""
    calls = [call.partition(" ") for call in seen.calls]
    return [rest for operator, _, rest in calls if operator == name]


def stacked(make, count):
    """Models, their stack, and the page's ``member`` for it."""
    with torch.device("meta"):
        skeleton = make()
    models = [make() for _ in range(count)]

    def member(state, x):
        return functional_call(skeleton, state, (x,), strict=True)

    return models, stack_module_state(models), member


def test_the_number_of_operators_does_not_grow_with_the_models():
    numbers = set()
    for count in (2, 5, 9):
        _, state, member = stacked(make_cnn, count)
        with Operators() as there:
            loss = vmap(member)(state, torch.randn(count, 2, 1, 28, 28)).sum()
        with Operators() as back:
            loss.backward()
        numbers.add((len(there.calls), len(back.calls)))
    assert len(numbers) == 1


def test_biases_and_the_clone_are_what_vmap_moves_more():
    models, state, member = stacked(make_cnn, 4)
    x = torch.randn(4, 16, 1, 28, 28)
    with torch.no_grad(), Operators() as loop:
        [model(rows) for model, rows in zip(models, x, strict=True)]
    with torch.no_grad(), Operators() as call:
        vmap(member)(state, x)
    shapes = [c.split()[0] for name in ("add", "clone") for c in calls_of(call, name)]
    added = sum(8 * math.prod(map(int, shape.split("x"))) for shape in shapes)
    assert 0.9 < added / (call.bytes - loop.bytes) < 1.1


def test_a_convolution_with_a_shared_input_is_one_wide_convolution():
    args = torch.randn(5, 7, 9, 9), torch.randn(3, 4, 7, 3, 3), torch.randn(3, 4)
    with Operators() as seen:
        vmap(F.conv2d, in_dims=(None, 0, 0))(*args)
    assert calls_of(seen, "convolution") == ["5x7x9x9 12x7x3x3 groups=1"]


FORMULA = re.search(r"``(torch.softmax.*)``", text_of("speed/plot_what_vmap_runs"))[1]
FUSED, WRITTEN = F.scaled_dot_product_attention, eval(f"lambda q, k, v: {FORMULA}")


def with_slopes(attention):
    slopes = grad(lambda *qkv: attention(*qkv).square().sum(), argnums=(0, 1, 2))
    return lambda *qkv: torch.stack([attention(*qkv), *slopes(*qkv)])


def test_attention_is_right_looped_over_and_written_out():
    qkv = torch.randn(3, 4, 2, 3, 5, 8, dtype=torch.float64)
    alone = torch.stack([with_slopes(FUSED)(*rows) for rows in qkv.unbind(1)])
    with pytest.warns(UserWarning, match="performance drop"), Operators() as seen:
        looped = vmap(with_slopes(FUSED))(*qkv)
    calls = [call for call in seen.calls if "dot_product" in call]
    assert len(calls) % 4 == 0 < len(calls)  # one for each model
    written = vmap(with_slopes(WRITTEN))(*qkv)  # a warning would be an error here
    torch.testing.assert_close(looped, alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(written, alone, atol=1e-12, rtol=0)


def test_a_transformer_layer_in_training_loops_over_nothing_with_the_math_backend():
    def make():
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    models, state, member = stacked(make, 3)
    x = torch.randn(2, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        gradient = grad(lambda s, x: member(s, x).square().sum())
        vmap(gradient, in_dims=(0, None))(state, x)
        outputs = vmap(member, in_dims=(0, None))(state, x)
    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(outputs, expected)


FAULTS = """
import resource
def faults(megabytes):
    counts = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes, 2**18)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)  # a system under pressure may take pages back in between
print(faults(64), keep_memory() or faults(64))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_are_fresh_until_memory_is_kept():
    script = functions_of("speed/plot_what_vmap_runs", "keep_memory") + FAULTS
    command = [sys.executable, "-W", "ignore", "-c", script]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    large, kept = map(int, child.stdout.split())
    assert large > 1000  # of 16,384 pages of 4 KiB; fewer if they are larger
    assert kept < 100
