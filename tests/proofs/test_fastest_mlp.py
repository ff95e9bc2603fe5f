"""What plot_fastest_mlp.py says without showing it."""

import pytest
import torch
from pages import cells_of, functions_of, names_of
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

# Of torch itself, while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PAGE = "speed/plot_fastest_mlp"
NAMES = ["mlp", "predict", "predict_shared", "alone"]
mlp, predict, predict_shared, alone = map(names_of(PAGE, *NAMES).get, NAMES)


with torch.device("meta"):
    skeleton = mlp(5, 7, 3)


def one(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def some(members=4, rows=6, sizes=(5, 7, 3)):
    params, _ = stack_module_state([mlp(*sizes) for _ in range(members)])
    return params, torch.randn(members, rows, sizes[0])


class Called(TorchDispatchMode):
    """Operators that are called and compute something, and shapes of their inputs."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":
            self.names.append(name)
            self.shapes.append([a.shape for a in args if torch.is_tensor(a)])
        return func(*args, **(kwargs or {}))


def called(function, *args):
    with Called() as mode:
        function(*args)
    return mode


def test_a_member_needs_three_operators_vmap_seven_and_by_hand_three_for_all():
    params, x = some()
    weights = [p[0] for p in params.values()]
    assert called(alone, weights, x[0]).names == ["addmm", "relu_", "addmm"]
    assert called(predict, params, x).names == ["baddbmm", "relu_", "baddbmm"]
    layer = ["bmm", "mul", "add"]
    assert called(vmap(one), params, x).names == [*layer, "relu", *layer]
    shared = called(vmap(one, in_dims=(0, None)), params, x[0])
    assert shared.names == [*layer, "relu", *layer]
    assert shared.shapes[0][0] == x.shape, "one product for each member"
    wide = called(predict_shared, params, x[0])
    assert wide.names == ["addmm", "relu_", "baddbmm"]
    assert wide.shapes[0][1] == (4 * 7, 5), "the weights of all members"


def test_on_a_cpu_baddbmm_writes_the_bias_first():
    params, x = some()
    with torch.profiler.profile(acc_events=True) as profiler:
        predict(params, x)
    names = [event.name for event in profiler.events()]
    assert names.count("aten::copy_") == names.count("aten::baddbmm") == 2


@pytest.mark.parametrize("form", ["vmap", "by hand", "alone"])
def test_dynamic_compiles_once_for_all_sizes_above_1_and_for_each_size_of_1(form):
    torch.compiler.reset()
    function = {"vmap": vmap(one), "by hand": predict, "alone": alone}[form]
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, dynamic=True)
    above = [(100, 16, (64, 32, 10)), (16, 64, (78, 104, 10)), (7, 7, (7, 7, 7))]
    ones = [(9, 1, (5, 7, 3)), (9, 6, (1, 7, 3)), (9, 6, (5, 1, 3)), (9, 6, (5, 7, 1))]
    steps = zip([1, 1, 1, 2, 3, 4, 5], above + ones, strict=True)
    for forms, (members, rows, sizes) in steps:
        params, x = some(members, rows, sizes)
        if form == "alone":
            params, x = [p[0] for p in params.values()], x[0]
        torch.testing.assert_close(compiled(params, x), function(params, x))
        assert counter.frame_count == forms


def test_the_check_notices_square_weights_that_are_not_transposed():
    (cell,) = [cell.code for cell in cells_of(PAGE) if "together = " in cell.code]
    check, (params, x) = cell[cell.index("params64 =") :], some(sizes=(5, 5, 5))
    right, given = functions_of(PAGE, *NAMES), {"one": one, "params": params, "x": x}
    exec(right + check, {**given})
    for weights in ["w1", "w2"]:
        wrong = right.replace(f"{weights}.mT", weights)
        with pytest.raises(AssertionError, match="by hand is not what vmap computes"):
            exec(wrong + check, {**given})
