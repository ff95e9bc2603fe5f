"""Changes a tutorial from outside, so that no script carries a switch for tests.

Python imports this file at start when its folder is on PYTHONPATH.

Always: ``Timer.blocked_autorange`` measures one run. The work stays the same.
SABOTAGE=name breaks one thing: what ``vmap`` does (VMAP_FAULTS below) or another part
of PyTorch (OTHER_FAULTS). SABOTAGE=name@3 breaks only the third function that ``vmap``
makes. The docstring of each fault says what it does.
"""

import functools
import itertools
import os

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten
from torch.utils.benchmark import Measurement, Timer


def one_run(timer, callback=None, min_run_time=0.2):
    return Measurement(1, [timer._timeit(1)], timer._task_spec)


Timer.blocked_autorange = one_run


# Faults of vmap. Each gets a call, not yet made, and returns what vmap shall return:
# vmap itself, the function and its options, the arguments.


def disturb(vmap, function, options, args):
    """All results are off by about 1e-3."""

    def off(result):
        if not result.is_floating_point():
            return result
        return result * (1 + 1e-3) + 1e-3  # both terms: gradients change as well

    return tree_map_only(torch.Tensor, off, vmap(function, **options)(*args))


def swap(vmap, function, options, args):
    """In all results the first two members change places."""

    def exchange(result):
        if result.ndim == 0 or result.shape[0] < 2:
            return result
        return torch.cat([result[1:2], result[:1], result[2:]])

    return tree_map_only(torch.Tensor, exchange, vmap(function, **options)(*args))


def accept(vmap, function, options, args):
    """Nothing is refused: where vmap would raise, it returns None."""
    try:
        return vmap(function, **options)(*args)
    except (RuntimeError, ValueError):
        return None


def loop(vmap, function, options, args):
    """The members run one by one: the same values, many more operators."""
    in_dims = options.get("in_dims", 0)
    in_dims = (in_dims,) * len(args) if isinstance(in_dims, int) else in_dims
    leaves, tree = tree_flatten(args)
    dims = []
    for argument, dim in zip(args, in_dims, strict=True):
        if isinstance(dim, (int, type(None))):
            dims += [dim] * len(tree_flatten(argument)[0])
        else:
            dims += tree_flatten(dim, is_leaf=lambda entry: entry is None)[0]
    mapped = [(x, dim) for x, dim in zip(leaves, dims, strict=True) if dim is not None]
    results = []
    for i in range(mapped[0][0].shape[mapped[0][1]]):
        row = [
            x if dim is None else x.select(dim, i)
            for x, dim in zip(leaves, dims, strict=True)
        ]
        results.append(function(*tree_unflatten(row, tree)))
    return tree_map(lambda *members: torch.stack(members), *results)


def spread(vmap, function, options, args):
    """Every member gets its own copy of what all share."""
    (size,) = {x.shape[0] for x in tree_flatten(args[0])[0]}
    return vmap(function)(args[0], *(torch.stack([x] * size) for x in args[1:]))


def again(vmap, function, options, args):
    """Everything is computed ten times."""
    return [vmap(function, **options)(*args) for _ in range(10)][-1]


def nochunk(vmap, function, options, args):
    """The chunk_size is ignored."""
    return vmap(function, **options | {"chunk_size": None})(*args)


def forget(vmap, function, options, args):
    """The values are right, but autograd saves no activations for the way back."""
    with torch.no_grad():
        result = vmap(function, **options)(*args)
    leaves = [x for x in tree_flatten(args)[0] if x.requires_grad]
    return result + 0 * sum(leaf.sum() for leaf in leaves)


VMAP_FAULTS = [disturb, swap, accept, loop, spread, again, nochunk, forget]


def break_vmap(fault, only):
    vmap, count = torch.func.vmap, itertools.count(1)

    @functools.wraps(vmap)
    def vmap_with_fault(function, in_dims=0, **options):
        options["in_dims"] = in_dims
        if only and next(count) != only:
            return vmap(function, **options)

        @functools.wraps(function)
        def call(*args):
            return fault(vmap, function, options, args)

        return call

    torch.vmap = torch.func.vmap = vmap_with_fault


# Other faults. Each changes PyTorch when it is called.


def wrongstack():
    """``stack_module_state`` returns copies that are off by 1e-3."""
    stack = torch.func.stack_module_state

    def stack_module_state(models):
        params, buffers = stack(models)
        return {name: x.detach() * 1.001 for name, x in params.items()}, buffers

    torch.func.stack_module_state = stack_module_state


def hoard():
    """``stack_module_state`` keeps copies of its own."""
    stack, kept = torch.func.stack_module_state, []

    def stack_module_state(models):
        params, buffers = stack(models)
        kept.append({name: x.clone() for name, x in params.items()})
        return params, buffers

    torch.func.stack_module_state = stack_module_state


def copyload():
    """``load_state_dict(assign=True)`` copies."""
    load = torch.nn.Module.load_state_dict

    def load_state_dict(self, state, **options):
        return load(self, {name: x.clone() for name, x in state.items()}, **options)

    torch.nn.Module.load_state_dict = load_state_dict


def wrongloop():
    """``torch.stack``, which collects the loop, is off by 1e-3 in float32."""
    stack = torch.stack

    def off(*args, **options):
        result = stack(*args, **options)
        plain = result.dtype == torch.float32 and not result.requires_grad
        return result * (1 + 1e-3) if plain else result

    torch.stack = off


def scale_tolerance(factor):
    """``assert_close`` gets a tolerance changed by a factor."""
    compare = torch.testing.assert_close

    def assert_close(actual, expected, **options):
        if "atol" in options:
            options["atol"] *= factor
        compare(actual, expected, **options)

    torch.testing.assert_close = assert_close


def strict():
    """The tolerance is a million times too small."""
    scale_tolerance(1e-6)


def lenient():
    """The tolerance is a thousand times too large."""
    scale_tolerance(1e3)


def blind():
    """The tolerance allows everything."""
    scale_tolerance(1e20)


def argmin():
    """Every second ``argmax`` returns the position of the minimum."""
    argmax, count = torch.Tensor.argmax, itertools.count()

    def every_second(tensor, *args):
        find = argmax if next(count) % 2 else torch.Tensor.argmin
        return find(tensor, *args)

    torch.Tensor.argmax = every_second


def stuck():
    """The switches of precision cannot leave "ieee"."""
    setter = torch._C._set_fp32_precision_setter
    torch._C._set_fp32_precision_setter = lambda backend, op, _: setter(
        backend, op, "ieee"
    )


OTHER_FAULTS = [
    wrongstack,
    hoard,
    copyload,
    wrongloop,
    strict,
    lenient,
    blind,
    argmin,
    stuck,
]

if os.environ.get("SABOTAGE"):
    name, _, only = os.environ["SABOTAGE"].partition("@")
    faults = {fault.__name__: fault for fault in VMAP_FAULTS + OTHER_FAULTS}
    if faults[name] in VMAP_FAULTS:
        break_vmap(faults[name], int(only or 0))
    else:
        faults[name]()
