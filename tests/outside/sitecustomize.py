"""Changes a tutorial from outside, so that no script carries a switch for tests.

Python imports this file at start when its folder is on PYTHONPATH.

Always: ``Timer.blocked_autorange`` measures one run. The work stays the same.
SABOTAGE=name breaks one thing: what ``vmap`` does (FAULTS_OF_VMAP below) or another
part of PyTorch (FAULTS). SABOTAGE=name@3 breaks only the third function that ``vmap``
makes. The docstring of each fault says what it does.
"""

import contextlib
import copy
import functools
import gc
import itertools
import os

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten
from torch.utils.benchmark import Measurement, Timer


def one_run(timer, callback=None, min_run_time=0.2):
    return Measurement(1, [timer._timeit(1)], timer._task_spec)


Timer.blocked_autorange = one_run


FAULTS_OF_VMAP, FAULTS = {}, {}  # name -> function


def fault_of_vmap(function):
    FAULTS_OF_VMAP[function.__name__] = function
    return function


def fault(function):
    FAULTS[function.__name__] = function
    return function


# Faults of vmap. Each gets a call, not yet made, and returns what vmap shall return:
# vmap itself, the function and its options, the arguments.


@fault_of_vmap
def disturb(vmap, function, options, args):
    """All results are off by about 1e-3."""

    def off(result):
        if not result.is_floating_point():
            return result
        return result * (1 + 1e-3) + 1e-3  # both terms: gradients change as well

    return tree_map_only(torch.Tensor, off, vmap(function, **options)(*args))


@fault_of_vmap
def swap(vmap, function, options, args):
    """In all results the first two members change places."""

    def exchange(result):
        if result.ndim == 0 or result.shape[0] < 2:
            return result
        return torch.cat([result[1:2], result[:1], result[2:]])

    return tree_map_only(torch.Tensor, exchange, vmap(function, **options)(*args))


@fault_of_vmap
def accept(vmap, function, options, args):
    """Nothing is refused: where vmap would raise, it returns None."""
    try:
        return vmap(function, **options)(*args)
    except (RuntimeError, ValueError):
        return None


@fault_of_vmap
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


@fault_of_vmap
def spread(vmap, function, options, args):
    """Every member gets its own copy of what all share."""
    (size,) = {x.shape[0] for x in tree_flatten(args[0])[0]}
    return vmap(function)(args[0], *(torch.stack([x] * size) for x in args[1:]))


@fault_of_vmap
def again(vmap, function, options, args):
    """Everything is computed ten times."""
    return [vmap(function, **options)(*args) for _ in range(10)][-1]


@fault_of_vmap
def nochunk(vmap, function, options, args):
    """The chunk_size is ignored."""
    return vmap(function, **options | {"chunk_size": None})(*args)


@fault_of_vmap
def forget(vmap, function, options, args):
    """The values are right, but autograd saves no activations for the way back."""
    with torch.no_grad():
        result = vmap(function, **options)(*args)
    leaves = [x for x in tree_flatten(args)[0] if x.requires_grad]
    return result + 0 * sum(leaf.sum() for leaf in leaves)


calls = itertools.count()


@fault_of_vmap
def tired(vmap, function, options, args):
    """From the tenth call on, results are off as in disturb."""
    if next(calls) < 9:
        return vmap(function, **options)(*args)
    return disturb(vmap, function, options, args)


@fault_of_vmap
def shift(vmap, function, options, args):
    """All results are larger by 1e-3, which no cross entropy notices."""
    return tree_map_only(
        torch.Tensor, lambda x: x + 1e-3, vmap(function, **options)(*args)
    )


@fault_of_vmap
def stale(vmap, function, options, args):
    """What the function writes into its arguments does not reach the caller."""
    args = tree_map_only(torch.Tensor, lambda x: x.clone(), args)
    return vmap(function, **options)(*args)


@fault_of_vmap
def handback(vmap, function, options, args):
    """What the function puts into a dictionary reaches the caller."""

    def both(*inputs):
        return function(*inputs), inputs

    result, inputs = vmap(both, **options)(*args)
    for before, after in zip(args, inputs, strict=True):
        if isinstance(before, dict):
            before.update(after)
    return result


@fault_of_vmap
def onemask(vmap, function, options, args):
    """randomness="different" is taken for "same"."""
    if options.get("randomness") == "different":
        options = options | {"randomness": "same"}
    return vmap(function, **options)(*args)


@fault_of_vmap
def manymasks(vmap, function, options, args):
    """randomness="same" is taken for "different"."""
    if options.get("randomness") == "same":
        options = options | {"randomness": "different"}
    return vmap(function, **options)(*args)


@fault_of_vmap
def late(vmap, function, options, args):
    """Some random numbers are lost before the call."""
    torch.rand(7)
    return vmap(function, **options)(*args)


@fault_of_vmap
def coarse(vmap, function, options, args):
    """All float32 results are rounded to bfloat16."""

    def rounded(result):
        short = result.dtype == torch.float32
        return result.bfloat16().float() if short else result

    return tree_map_only(torch.Tensor, rounded, vmap(function, **options)(*args))


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


@fault
def wrongstack():
    """``stack_module_state`` returns copies that are off by 1e-3."""
    stack = torch.func.stack_module_state

    def stack_module_state(models):
        params, buffers = stack(models)
        return {name: x.detach() * 1.001 for name, x in params.items()}, buffers

    torch.func.stack_module_state = stack_module_state


@fault
def hoard():
    """``stack_module_state`` keeps copies of its own."""
    stack, kept = torch.func.stack_module_state, []

    def stack_module_state(models):
        params, buffers = stack(models)
        kept.append({name: x.clone() for name, x in params.items()})
        return params, buffers

    torch.func.stack_module_state = stack_module_state


@fault
def copyload():
    """``load_state_dict(assign=True)`` copies."""
    load = torch.nn.Module.load_state_dict

    def load_state_dict(self, state, **options):
        return load(self, {name: x.clone() for name, x in state.items()}, **options)

    torch.nn.Module.load_state_dict = load_state_dict


@fault
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


@fault
def strict():
    """The tolerance is a million times too small."""
    scale_tolerance(1e-6)


@fault
def lenient():
    """The tolerance is a thousand times too large."""
    scale_tolerance(1e3)


@fault
def blind():
    """The tolerance allows everything."""
    scale_tolerance(1e20)


@fault
def argmin():
    """Every second ``argmax`` returns the position of the minimum."""
    argmax, count = torch.Tensor.argmax, itertools.count()

    def every_second(tensor, *args):
        find = argmax if next(count) % 2 else torch.Tensor.argmin
        return find(tensor, *args)

    torch.Tensor.argmax = every_second


@fault
def stuck():
    """The switches of precision cannot leave "ieee"."""
    setter = torch._C._set_fp32_precision_setter
    torch._C._set_fp32_precision_setter = lambda backend, op, _: setter(
        backend, op, "ieee"
    )


@fault
def noclip():
    """``clip_grad_norm_`` changes nothing."""
    torch.nn.utils.clip_grad_norm_ = lambda params, max_norm: None


@fault
def wild():
    """``torch.randn_like`` is a million million times too large."""
    randn_like = torch.randn_like
    torch.randn_like = lambda x: 1e12 * randn_like(x)


@fault
def nomean():
    """``torch.mean`` returns the sum."""
    torch.mean = torch.sum


@fault
def fastsgd():
    """Every second SGD has a learning rate one percent too large."""
    init, count = torch.optim.SGD.__init__, itertools.count(1)

    def faster(self, params, lr):
        init(self, params, lr=lr if next(count) % 2 else 1.01 * lr)

    torch.optim.SGD.__init__ = faster


@fault
def noeval():
    """``Module.eval`` does nothing."""
    torch.nn.Module.eval = lambda self: self


@fault
def keeptie():
    """``Module.to`` keeps what was tied."""
    to = torch.nn.Module.to

    def tied(self, *args, **options):
        names = {}
        for name, p in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        to(self, *args, **options)
        for first, *others in names.values():
            for other in others:
                path, _, name = other.rpartition(".")
                setattr(self.get_submodule(path), name, self.get_parameter(first))
        return self

    torch.nn.Module.to = tied


@fault
def lax():
    """``stack_module_state`` refuses nothing."""
    stack = torch.func.stack_module_state

    def stack_module_state(models):
        try:
            return stack(models)
        except (RuntimeError, KeyError):
            return {}, {}

    torch.func.stack_module_state = stack_module_state


@fault
def stubborn():
    """The probability of a dropout layer is always 0.5."""
    torch.nn.Dropout.p = property(lambda self: 0.5, lambda self, value: None)


@fault
def noseed():
    """Only the first seed counts."""
    seed, count = torch.manual_seed, itertools.count()
    torch.manual_seed = lambda number: None if next(count) else seed(number)


@fault
def nogenerator():
    """``torch.rand`` draws from the global generator."""
    rand = torch.rand
    torch.rand = lambda *size, generator=None: rand(*size)


@fault
def anyoptimizer():
    """``torch.optim.AdamW`` takes everything."""
    init = torch.optim.AdamW.__init__

    def tolerant(self, *args, **options):
        with contextlib.suppress(ValueError):
            init(self, *args, **options)

    torch.optim.AdamW.__init__ = tolerant


@fault
def coupled():
    """``torch.optim.AdamW`` decays through the gradients, as Adam does."""

    class AdamW(torch.optim.Adam):
        pass

    torch.optim.AdamW = AdamW


@fault
def descending():
    """``argsort`` puts the largest first."""
    argsort = torch.Tensor.argsort
    torch.Tensor.argsort = lambda x, dim: argsort(x, dim=dim, descending=True)


@fault
def stay():
    """``Module.to`` does nothing."""
    torch.nn.Module.to = lambda module, *args, **options: module


@fault
def lazy():
    """Adam steps without a change."""
    torch.optim.Adam.step = lambda optimizer: None


@fault
def wrongclone():
    """``Tensor.clone`` without options is off by 1e-3 for parameters."""
    clone = torch.Tensor.clone

    def off(tensor, **options):
        result = clone(tensor, **options)
        return result * (1 + 1e-3) if tensor.requires_grad and not options else result

    torch.Tensor.clone = off


@fault
def window():
    """``Tensor.clone`` without options does not copy."""
    clone = torch.Tensor.clone

    def same(tensor, **options):
        return clone(tensor, **options) if options else tensor

    torch.Tensor.clone = same


@fault
def untie():
    """A deep copy of a ``Sequential`` copies every layer by itself."""

    def copied(model, memo):
        layers = [copy.deepcopy(layer, memo) for layer in model]
        return torch.nn.Sequential(*map(copy.deepcopy, layers)).train(model.training)

    torch.nn.Sequential.__deepcopy__ = copied


@fault
def wrongload(kind=list):
    """``torch.load`` returns parameters that are off by 1e-3."""
    load = torch.load

    def off(file, **options):
        state = load(file, **options)
        if not isinstance(state, kind):
            return state
        return tree_map(
            lambda x: x * (1 + 1e-3) if torch.is_tensor(x) and x.ndim > 1 else x, state
        )

    torch.load = off


@fault
def wrongcheckpoint():
    """The same, for files that hold one dictionary."""
    wrongload(dict)


@fault
def forgetful():
    """An optimizer that loads its state forgets Adam's running averages."""
    load = torch.optim.Optimizer.load_state_dict

    def load_state_dict(optimizer, state):
        load(optimizer, state)
        for entry in optimizer.state.values():
            entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])

    torch.optim.Optimizer.load_state_dict = load_state_dict


@fault
def readonly():
    """Assigning rows of a tensor changes nothing."""
    torch.Tensor.__setitem__ = lambda tensor, index, value: None


@fault
def haunt():
    """Adam moves every parameter that has a gradient, its own or not."""
    step = torch.optim.Adam.step

    def haunted(optimizer):
        step(optimizer)
        for thing in gc.get_objects():
            if type(thing) is torch.nn.Parameter and thing.grad is not None:
                thing.data -= 1e-6

    torch.optim.Adam.step = haunted


@fault
def blindfold():
    """``named_modules(remove_duplicate=False)`` finds nothing."""
    named_modules = torch.nn.Module.named_modules

    def named(module, *args, **options):
        if not args and options == {"remove_duplicate": False}:
            return iter(())
        return named_modules(module, *args, **options)

    torch.nn.Module.named_modules = named


@fault
def unstrict():
    """``load_state_dict`` is never strict."""
    load = torch.nn.Module.load_state_dict

    def load_state_dict(module, state, **options):
        return load(module, state, strict=False)

    torch.nn.Module.load_state_dict = load_state_dict


@fault
def wrongmean():
    """``TensorDict.mean`` is off by 1e-3."""
    import tensordict

    mean = tensordict.TensorDict.mean
    tensordict.TensorDict.mean = lambda *args, **options: mean(*args, **options) * 1.001


@fault
def wrongprogram():
    """``torch.export.load`` returns weights that are off by 1e-3."""
    load = torch.export.load

    def off(file):
        program = load(file)
        for tensor in program.state_dict.values():
            if tensor.is_floating_point():
                tensor.data *= 1 + 1e-3
        return program

    torch.export.load = off


@fault
def anysize():
    """Where exported programs would refuse an input, they return None."""
    module = torch.export.ExportedProgram.module

    def tolerant(program, *args, **options):
        call = module(program, *args, **options)
        run = type(call).__call__

        def run_or_not(*inputs):
            try:
                return run(*inputs)
            except AssertionError:
                return None

        type(call).__call__ = run_or_not
        return call

    torch.export.ExportedProgram.module = tolerant


@fault
def fixedsize():
    """No size can be dynamic."""
    export = torch.export.export

    def fixed(module, inputs, dynamic_shapes=None):
        if dynamic_shapes:
            raise RuntimeError("the size has to be fixed")
        return export(module, inputs)

    torch.export.export = fixed


if os.environ.get("SABOTAGE"):
    name, _, only = os.environ["SABOTAGE"].partition("@")
    if name in FAULTS_OF_VMAP:
        break_vmap(FAULTS_OF_VMAP[name], int(only or 0))
    else:
        FAULTS[name]()
