"""plot_custom_operators.py: what it says of rules, orders, warnings, compiled code."""

import re
import warnings
from types import ModuleType

import pytest
import torch
from pages import names_of, text_of
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

NAME = "basics/plot_custom_operators"
SEEN = []
PAGE = names_of(
    NAME,
    *("kernel", "gradients", "members_first", "Sign", "Scan", "LibraryScan", "Wrapped"),
    *("WrappedGradient", "scan_backward", "ScanOp", "CallsTheKernel", "plain_scan"),
    seen=SEEN,
)
Scan, ScanOp, kernel = PAGE["Scan"], PAGE["ScanOp"], PAGE["kernel"]
A, X = torch.rand(5, 8).double(), torch.randn(5, 8).double()


def operator(name, rule=True):
    """As the page makes it."""
    made = torch.library.custom_op(f"proofs::{name}", kernel, mutates_args=())
    made.register_fake(lambda a, x: torch.empty_like(x))
    if rule:
        made.register_vmap(rule_of(made))
    made.register_autograd(PAGE["scan_backward"], setup_context=Scan.setup_context)
    return made


def rule_of(made):
    return lambda info, dims, *t: (made(*PAGE["members_first"](info, dims, *t)), 0)


WITHOUT = operator("without", rule=False)
SCAN = PAGE["scan"] = operator("scan")


def loss_of(op):
    return lambda a, x: op(a, x).sin().sum()


def slopes_of(op, a, x):
    """Of one member after the other, without torch.func."""
    a, x = a.clone().requires_grad_(), x.clone().requires_grad_()
    total = sum(loss_of(op)(*rows) for rows in zip(a, x, strict=True))
    return torch.autograd.grad(total, (a, x))


SLOPES = slopes_of(PAGE["plain_scan"], A, X)


def counted(call):
    SEEN.clear()
    return call(), len(SEEN)


def test_the_backward_is_the_derivative():
    inputs = A[0].clone().requires_grad_(), X[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(Scan.apply, inputs)
    assert torch.autograd.gradgradcheck(Scan.apply, inputs)


@pytest.mark.parametrize("form", [Scan, PAGE["Wrapped"], ScanOp])
def test_inputs_that_all_share_and_nested_calls(form):
    for dims, a, x in ((None, 0), A[0], X), ((0, None), A, X[0]), ((1, 1), A.T, X.T):
        found, calls = counted(lambda d=dims, a=a, x=x: vmap(form.apply, d)(a, x))
        rows = [
            t.expand(5, 8) if d is None else t.movedim(d, 0)
            for d, t in zip(dims, (a, x), strict=True)
        ]
        torch.testing.assert_close(found, kernel(*rows))
        assert calls == 1
        slope = vmap(grad(loss_of(form.apply), (0, 1)), dims)
        torch.testing.assert_close(slope(a, x), slopes_of(PAGE["plain_scan"], *rows))
    nested, calls = counted(lambda: vmap(vmap(form.apply))(A[None], X[None]))
    assert calls == 1
    torch.testing.assert_close(nested[0], kernel(A, X))


def test_the_gradient_of_what_all_share_is_the_sum():
    for form in Scan, PAGE["Wrapped"], ScanOp:
        shared = A[0].clone().requires_grad_()
        vmap(loss_of(form.apply), (None, 0))(shared, X).sum().backward()
        torch.testing.assert_close(
            shared.grad, slopes_of(PAGE["plain_scan"], A[:1].expand(5, 8), X)[0].sum(0)
        )


def test_which_form_works_where():
    """The calls are those of the page's table."""
    library = PAGE["LibraryScan"].apply
    forms = (
        *((Scan.apply, 1, 2, 2), (library, None, None, None)),
        *((PAGE["Wrapped"].apply, 1, 3, 3), (WITHOUT, 5, None, 10)),
        *((SCAN, 1, None, 2), (ScanOp.apply, 1, 2, 2)),
    )
    a, x = A.clone().requires_grad_(), X.clone().requires_grad_()
    for form, *expected in forms:
        loss = loss_of(form)
        for call, times in zip(
            (
                lambda form=form: vmap(form)(A, X),
                lambda loss=loss: vmap(grad(loss))(A, X),
                lambda loss=loss: vmap(loss)(a, x).sum().backward(),
            ),
            expected,
            strict=True,
        ):
            if times is None:
                with pytest.raises(RuntimeError, match="override the setup_context"):
                    call()
            else:
                assert counted(call)[1] == times


def test_a_kernel_that_reads_pointers_needs_contiguous_tensors():
    def by_pointer(*tensors):
        return kernel(
            *(t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in tensors)
        )

    for body, right in (
        (by_pointer, False),
        (lambda a, x: by_pointer(a.contiguous(), x.contiguous()), True),
    ):
        op = names_of(NAME, "Scan", "members_first", kernel=body)["Scan"].apply
        found = vmap(op, (0, 1))(A, X.T.contiguous())
        assert torch.allclose(found, kernel(A, X)) is right


def test_a_triton_op_takes_the_rule():
    @torch.library.triton_op("proofs::body_of_pytorch", mutates_args=())
    def made(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return a * x

    seen = []
    made.register_vmap(lambda *given: (seen.append(given), rule_of(made)(*given))[1])
    torch.testing.assert_close(vmap(made, (0, 1))(A, X.T), A * X)
    assert len(seen) == 1


def narrow(a, x):
    """Takes one batch dimension."""
    assert x.ndim == 2
    return kernel(a, x)


def single(a, x):
    """Takes none."""
    assert x.ndim == 1
    return kernel(a, x)


@pytest.mark.parametrize("taken", [narrow, single])
def test_a_kernel_that_takes_one_batch_dimension_or_none(taken):
    flat, parted, stacked = re.findall(
        r"``(y = .+?|y\.unflatten.+?|torch\.stack\(\[Scan.+?)``",
        re.sub(r"\n# *", " ", text_of(NAME)),
    )
    names = names_of(NAME, "Scan", "gradients", "members_first", kernel=taken)
    rule = "def rule(info, in_dims, *tensors):\n"
    rule += "    members = members_first(info, in_dims, *tensors)\n"
    if taken is narrow:
        rule += f"    {flat}\n"
    exec(rule + f"    return {parted if taken is narrow else stacked}", names)
    op, rows = names["Scan"], (3,) * (taken is narrow)
    op.vmap = staticmethod(names["rule"])
    a, x = torch.rand(5, *rows, 8).double(), torch.randn(5, *rows, 8).double()
    found, calls = counted(lambda: vmap(op.apply, out_dims=1)(a, x))
    torch.testing.assert_close(found.movedim(1, 0), kernel(a, x))
    assert calls == (1 if rows else 5)
    found = vmap(grad(loss_of(op.apply), (0, 1)))(a, x)
    torch.testing.assert_close(found, slopes_of(Scan.apply, a, x))


def test_a_number_has_no_row_and_two_outputs_have_two_out_dims():
    class Both(Scan):
        forward = staticmethod(lambda a, x, k: (kernel(a, x), kernel(a, k * x)))

        @staticmethod
        def vmap(info, in_dims, *inputs):
            assert in_dims[2] is None
            members = PAGE["members_first"](info, in_dims[:2], *inputs[:2])
            return Both.apply(*members, inputs[2]), (0, 0)

    one, two = vmap(lambda a, x: Both.apply(a, x, 3.0))(A, X)
    torch.testing.assert_close(two, 3 * one)


def test_a_module_of_a_library_takes_the_wrapped_class():
    module = ModuleType("module")
    module.LibraryScan = PAGE["LibraryScan"]
    exec("def layer(a, x):\n    return LibraryScan.apply(a, x)", vars(module))
    module.LibraryScan = PAGE["Wrapped"]
    found = vmap(grad(loss_of(module.layer), (0, 1)))(A, X)
    torch.testing.assert_close(found, SLOPES)


def test_a_wrapped_kernel_that_takes_one_batch_dimension():
    wanted = "LibraryScan", "Wrapped", "WrappedGradient", "gradients"
    names = names_of(NAME, *wanted, kernel=narrow)
    call, gradient = names["Wrapped"], names["WrappedGradient"]

    def flat(*args):
        return [t.flatten(0, 1) for t in PAGE["members_first"](*args)]

    def rule(info, *args):
        return call.apply(*flat(info, *args)).unflatten(0, (info.batch_size, -1)), 0

    def rule_of_gradient(info, *args):
        both = gradient.apply(*flat(info, *args))
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in both), (0, 0)

    call.vmap, gradient.vmap = staticmethod(rule), staticmethod(rule_of_gradient)
    a, x = torch.rand(5, 3, 8).double(), torch.randn(5, 3, 8).double()
    found, calls = counted(lambda: vmap(grad(loss_of(call.apply), (0, 1)))(a, x))
    assert calls == 3
    torch.testing.assert_close(found, slopes_of(Scan.apply, a, x))


def test_a_generated_rule_refuses_numpy():
    forward = staticmethod(lambda x: torch.from_numpy(x.numpy(force=True)))
    op = type("Copies", (PAGE["Sign"],), {"forward": forward})
    with pytest.raises(RuntimeError, match="that doesn't have storage"):
        vmap(op.apply)(X)


def test_a_kernel_in_backward_needs_a_function():
    class Direct(Scan):
        @staticmethod
        def backward(ctx, g):
            return PAGE["gradients"](g, *ctx.saved_tensors, kernel)

        @staticmethod
        def vmap(info, in_dims, *tensors):
            return Direct.apply(*PAGE["members_first"](info, in_dims, *tensors)), 0

    with pytest.raises(RuntimeError, match="that doesn't have storage"):
        vmap(grad(loss_of(Direct.apply)))(A, X)


def test_a_rule_by_name():
    library = torch.library.Library("proofs", "FRAGMENT")
    library.define("named(Tensor a, Tensor x) -> Tensor")
    library.impl("named", kernel, "CPU")
    op = torch.ops.proofs.named.default
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        assert not vmap(grad(loss_of(op)))(A, X).any()
    _, calls = counted(lambda: vmap(op)(A, X))
    assert calls == 5
    torch.library.register_vmap("proofs::named", rule_of(op))
    found, calls = counted(lambda: vmap(op)(A, X))
    assert calls == 1
    torch.testing.assert_close(found, kernel(A, X))


def test_neither_filter_nor_opcheck_finds_the_loop(capfd):
    with warnings.catch_warnings(action="error"):
        _, calls = counted(lambda: vmap(WITHOUT)(A, X))
    assert calls == 5
    assert "performance drop" in capfd.readouterr().err
    op = names_of(NAME, "ScanOp", "Scan", scan=WITHOUT)["ScanOp"]
    with pytest.warns(UserWarning, match="performance drop"):
        vmap(op.apply)(A, X)
    with warnings.catch_warnings(action="ignore"):
        inputs = A.clone().requires_grad_(), X.clone().requires_grad_()
        assert set(torch.library.opcheck(WITHOUT, inputs).values()) == {"SUCCESS"}


def test_a_rule_that_calls_the_kernel_is_right_in_one_order():
    op = PAGE["CallsTheKernel"].apply
    found = vmap(grad(loss_of(op), (0, 1)))(A, X)
    torch.testing.assert_close(found, SLOPES)
    with pytest.raises(RuntimeError, match="does not require grad"):
        vmap(op)(A, X.clone().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_forward_mode():
    assert not jvp(SCAN, (A, X), (A, X))[1].any()
    assert not jacfwd(SCAN, argnums=1)(A[0], X[0]).any()
    for transform in jacfwd, hessian:
        with pytest.raises(NotImplementedError, match="implement the jvp function"):
            transform(loss_of(Scan.apply))(A[0], X[0])
    for op in Scan.apply, ScanOp.apply:
        found = vmap(jacrev(jacrev(loss_of(op), 1), 1))(A, X)
        rows = zip(A, X, strict=True)
        loop = [hessian(loss_of(PAGE["plain_scan"]), 1)(*row) for row in rows]
        torch.testing.assert_close(found, torch.stack(loop))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_allowed_in_the_graph_a_function_keeps_its_backward(backend):
    for op in PAGE["Sign"], ScanOp:
        torch.compiler.allow_in_graph(op)
    slopes = vmap(grad(lambda x: PAGE["Sign"].apply(x).sum()))
    both = vmap(grad(loss_of(ScanOp.apply), (0, 1)))
    with warnings.catch_warnings(action="ignore"):
        found = torch.compile(slopes, backend=backend)(X)
        torch.testing.assert_close(found, slopes(X))
        found = torch.compile(both, backend=backend)(A, X)
        torch.testing.assert_close(found, SLOPES)


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="mended after 2.13")
def test_compiled_code_drops_the_backward_in_each_order():
    class Fresh(PAGE["Sign"]):
        """Not allowed in a graph."""

    def loss(x):
        return Fresh.apply(x).sum()

    x = X.clone().requires_grad_()
    with warnings.catch_warnings(action="ignore"):
        assert not torch.compile(grad(loss), backend="eager")(X).any()
        torch.compile(vmap(loss), backend="eager")(x).sum().backward()
        assert not x.grad.any()
        torch.compile(loss, backend="eager")(x).backward()
    assert torch.equal(x.grad, grad(loss)(X))
