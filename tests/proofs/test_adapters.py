"""What plot_adapters.py says in a clause."""

from functools import partial

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = names_of("uses/plot_adapters", device=torch.device("cpu"))
add_lora, build, predict = map(PAGE.get, ["add_lora", "build", "predict"])
PAGE["base"] = BASE = {n: p.detach().double() for n, p in build().named_parameters()}
with torch.device("meta"):
    PAGE["skeleton"] = add_lora(build())
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


def adapters(number):
    made = PAGE["new_adapters"](number)
    return {name: torch.randn_like(p).double() / 9 for name, p in made.items()}


def test_adapters_start_at_what_the_base_says():
    made = {name: p.detach().double() for name, p in PAGE["new_adapters"](3).items()}
    x = torch.randn(3, 5, 784).double()
    out = vmap(predict, in_dims=(0, None, 0))(made, BASE, x)
    close(out, functional_call(build(), BASE, (x,)))


def test_a_mixed_batch():
    own, x = adapters(4), torch.randn(9, 784).double()
    who = torch.arange(9) % 4
    rows = {name: p[who] for name, p in own.items()}
    mixed = vmap(predict, in_dims=(0, None, 0))(rows, BASE, x)
    for i, user in enumerate(who.tolist()):
        close(mixed[i], PAGE["alone"](BASE, own, user)(x[i]))


class Products(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if str(operator).startswith(("aten.mm.", "aten.addmm.", "aten.bmm.")):
            PAGE["seen"].append((str(operator), [tuple(a.shape) for a in args]))
        return operator(*args, **(kwargs or {}))


def test_one_product_for_the_rows_of_all_users():
    PAGE["seen"] = []
    with Products():
        vmap(predict, in_dims=(0, None, 0))(
            adapters(6), BASE, torch.randn(6, 5, 784).double()
        )
    shapes = [shapes for _, shapes in PAGE["seen"]]
    for weight in "024":
        out, inner = BASE[f"{weight}.weight"].shape
        assert any((30, inner) in s and (inner, out) in s for s in shapes), shapes


def test_adapters_are_added_as_often_as_they_are_made():
    own, x = adapters(1), torch.randn(5, 784).double()
    row = {name: p[0] for name, p in own.items()}
    once, twice = add_lora(build()), add_lora(add_lora(build()))
    once, twice = (functional_call(m, BASE | row, (x,)) for m in (once, twice))
    double = {name: 2 * p if name.endswith(".B") else p for name, p in row.items()}
    close(twice, functional_call(add_lora(build()), BASE | double, (x,)))
    assert (once - twice).abs().max() > 1e-3


def test_attention_never_calls_its_last_layer():
    attention = add_lora(nn.MultiheadAttention(8, 2))
    assert not hasattr(attention.out_proj, "A")
    called = []
    attention.out_proj.register_forward_hook(lambda *_: called.append(True))
    x = torch.randn(5, 8)
    attention(x, x, x)
    assert not called


@pytest.mark.parametrize("start", ["B", "A and B"])
def test_what_zeros_train(start):
    model = add_lora(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    for layer in model[::2]:
        nn.init.zeros_(layer.B)
        (nn.init.zeros_ if "A" in start else nn.init.normal_)(layer.A)
    model(torch.randn(5, 4)).square().sum().backward()
    assert (model[0].B.grad == 0).all() == (start == "A and B")
    assert (model[0].A.grad == 0).all()
