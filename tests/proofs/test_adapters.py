"""What plot_adapters.py says in a clause."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import functional_call, vmap

PAGE = names_of("uses/plot_adapters", device=torch.device("cpu"))
add_lora, build, predict = map(PAGE.get, ["add_lora", "build", "predict"])
PAGE["base"] = BASE = {n: p.detach().double() for n, p in build().named_parameters()}
with torch.device("meta"):
    PAGE["skeleton"] = SKELETON = add_lora(build())
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


def new_adapters(number):
    made = PAGE["new_adapters"](SKELETON, number)
    return {name: p.detach().double() for name, p in made.items()}


def module_of(adapter):
    """One user's model with hooks, and its trained parameters."""
    model = add_lora(build()).double()
    model.load_state_dict(BASE | adapter)
    return model, [p for n, p in model.named_parameters() if n in adapter]


def test_adapters_start_at_what_the_base_says():
    x = torch.randn(3, 5, 196).double()
    out = vmap(predict, in_dims=(0, None, 0))(new_adapters(3), BASE, x)
    close(out, functional_call(build(), BASE, (x,)))


def test_a_step_trains_what_each_model_trains_alone():
    own = new_adapters(5)
    alone = [module_of({n: p[i] for n, p in own.items()}) for i in range(5)]
    adams = [torch.optim.AdamW(weights, lr=1e-2) for _, weights in alone]
    start = {name: p.clone() for name, p in own.items()}
    own = {name: p.requires_grad_() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    x, y = torch.randn(5, 8, 196).double(), torch.randint(10, (5, 8))
    call = vmap(predict, in_dims=(0, None, 0))
    for _ in range(5):
        PAGE["train_step"](optimizer, call, own, x, y)
        for (model, _), adam, row, digits in zip(alone, adams, x, y, strict=True):
            adam.zero_grad()
            F.cross_entropy(model(row), digits).backward()
            adam.step()
    for i, (model, _) in enumerate(alone):
        for name, p in own.items():
            torch.testing.assert_close(
                p[i], model.get_parameter(name), atol=1e-9, rtol=0
            )
            assert (p[i] - start[name][i]).abs().max() > 1e-3


def test_merged_weights_fit_into_a_network_without_hooks():
    adapter = {name: torch.randn_like(p[0]) / 9 for name, p in new_adapters(1).items()}
    model, x = build().double(), torch.randn(5, 196).double()
    model.load_state_dict(PAGE["merged"](BASE, adapter))
    close(model(x), module_of(adapter)[0](x))


def test_adapters_are_added_as_often_as_they_are_made():
    row = {name: torch.randn_like(p[0]) / 9 for name, p in new_adapters(1).items()}
    x = torch.randn(5, 196).double()
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


def test_a_lower_rank_filled_with_zeros_stays_what_it_is():
    low = new_adapters(1)
    low = {name: torch.randn_like(p[0]) / 9 for name, p in low.items()}
    full = {}
    for name, p in low.items():
        shape = (2, p.shape[1]) if name.endswith(".A") else (p.shape[0], 2)
        full[name] = torch.cat([p, p.new_zeros(shape)], int(name.endswith(".B")))
    x, trained = torch.randn(5, 196).double(), []
    for adapter, rank in ((low, 4), (full, 6)):
        model = add_lora(build(), rank).double()
        model.load_state_dict(BASE | adapter)
        own = [p for name, p in model.named_parameters() if name in adapter]
        optimizer = torch.optim.AdamW(own, lr=1e-2)
        outputs = [model(x)]
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        trained.append([*outputs, model(x)])
    close(trained[0], trained[1])
    rest = [
        p[4:] if n.endswith(".A") else p[:, 4:]
        for n, p in model.named_parameters()
        if n in full
    ]
    assert not any(p.any() for p in rest)
