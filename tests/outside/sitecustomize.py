"""Changes a tutorial from outside, so that no script carries a switch for tests.

Python imports this file at start when its folder is on PYTHONPATH.

Always: ``Timer.blocked_autorange`` measures one run. The work stays the same.
SABOTAGE=disturb   every result of ``vmap`` is off by about 1e-3
SABOTAGE=swap      in every result of ``vmap`` the first two members change places
SABOTAGE=accept    ``vmap`` refuses nothing: where it would raise, it returns None
SABOTAGE=disturb@3 only what the third function made by ``vmap`` returns is disturbed
"""

import functools
import itertools
import os

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.benchmark import Measurement, Timer


def one_run(timer, callback=None, min_run_time=0.2):
    return Measurement(1, [timer._timeit(1)], timer._task_spec)


Timer.blocked_autorange = one_run


def disturb(result):
    if not result.is_floating_point():
        return result
    return result * (1 + 1e-3) + 1e-3  # both terms: gradients change as well


def swap(result):
    if result.ndim == 0 or result.shape[0] < 2:
        return result
    return torch.cat([result[1:2], result[:1], result[2:]])


def sabotaged(vmap, how, only):
    count = itertools.count(1)

    @functools.wraps(vmap)
    def vmap_with_fault(function, *options, **named_options):
        mapped = vmap(function, *options, **named_options)
        if only and next(count) != only:
            return mapped

        @functools.wraps(function)
        def call(*args, **kwargs):
            if how == "accept":
                try:
                    return mapped(*args, **kwargs)
                except (RuntimeError, ValueError):
                    return None
            fault = {"disturb": disturb, "swap": swap}[how]
            return tree_map_only(torch.Tensor, fault, mapped(*args, **kwargs))

        return call

    return vmap_with_fault


if os.environ.get("SABOTAGE"):
    how, _, only = os.environ["SABOTAGE"].partition("@")
    torch.vmap = torch.func.vmap = sabotaged(torch.func.vmap, how, int(only or 0))
