"""plot_custom_operators.py: the same lines, with a kernel in Triton (make test-all)."""

from __future__ import annotations

import pytest
import torch
from pages import names_of
from torch.func import grad, vmap

pytestmark = pytest.mark.slow
tl = None  # triton.language, imported by the tests only
NAME = "basics/plot_custom_operators"
WANTED = (
    *("members_first", "gradients", "Scan", "ScanOp", "plain_scan"),
    *("LibraryScan", "Wrapped", "WrappedGradient"),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scan(a, x, y, time: tl.constexpr):
    row = tl.program_id(0) * time
    last = tl.load(x + row)
    tl.store(y + row, last)
    for t in range(1, time):
        last = tl.load(a + row + t) * last + tl.load(x + row + t)
        tl.store(y + row + t, last)


@pytest.fixture
def compiled(monkeypatch):
    """Triton's interpreter runs on a CPU."""
    import triton
    import triton.language

    monkeypatch.setitem(globals(), "tl", triton.language)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(DEVICE == "cpu")))
    return triton.jit(scan)


def launched(kernel, seen):
    def run(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(list(x.shape))
        a, x = a.contiguous(), x.contiguous()
        y = torch.empty_like(x)
        kernel[(x.numel() // x.shape[-1],)](a, x, y, x.shape[-1])
        return y

    return run


@pytest.mark.parametrize("form", ["Scan", "Wrapped", "custom_op", "triton_op"])
def test_rules_for_a_kernel_of_triton(compiled, form):
    if form == "triton_op" and DEVICE == "cpu" and torch.__version__ < "2.13":
        pytest.skip("wrap_triton takes no kernel of the interpreter")
    seen = []
    page = names_of(NAME, *WANTED, kernel=launched(compiled, seen))
    op = page.get(form, page["ScanOp"]).apply
    if form.endswith("_op"):
        if form == "triton_op":
            body = launched(torch.library.wrap_triton(compiled), seen)
        else:
            body = page["kernel"]
        made = getattr(torch.library, form)(f"proofs_triton::{form}", mutates_args=())
        page["scan"] = made = made(body)
        made.register_vmap(lambda i, d, *t: (made(*page["members_first"](i, d, *t)), 0))
    a = torch.rand(5, 8, device=DEVICE).double().requires_grad_()
    x = torch.randn(8, 5, device=DEVICE).double().requires_grad_()
    rows = zip(a, x.T, strict=True)
    loop = torch.stack([page["plain_scan"](*row) for row in rows])
    slopes = torch.autograd.grad(loop.sin().sum(), (a, x))

    def loss(a, x):
        return op(a, x).sin().sum()

    def check(calls, found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert len(seen) == calls
        seen.clear()

    more = form == "Wrapped"
    check(1, vmap(op, (0, 1))(a, x), loop)
    check(2 + more, vmap(grad(loss, (0, 1)), (0, 1), (0, 1))(a, x), slopes)
    losses = vmap(loss, (0, 1))(a, x)
    check(2 + more, torch.autograd.grad(losses.sum(), (a, x)), slopes)
