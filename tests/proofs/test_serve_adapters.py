"""What plot_serve_adapters.py says in a clause."""

import pytest
import torch
from pages import names_of, peak_bytes
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = names_of("uses/plot_serve_adapters", device=torch.device("cpu"))
add_lora, build, predict = map(PAGE.get, ["add_lora", "build", "predict"])
BASE = {name: p.detach().double() for name, p in build().named_parameters()}
with torch.device("meta"):
    plain, skeleton = build(), add_lora(build())
PAGE |= {"base": BASE, "skeleton": skeleton, "plain": plain}
PAGE["every"] = vmap(predict, in_dims=(0, None, 0))
WAYS = ["serve", "serve_without_vmap", "serve_by_hand"]


def adapters(number):
    made = PAGE["random_adapters"](number)
    return {name: p.double() for name, p in made.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_row_with_zeros_in_b_answers_as_the_base(way):
    own, x, who = adapters(4), torch.randn(9, 784).double(), torch.arange(9) % 4
    for name in own:
        if name.endswith(".B"):
            own[name][2] = 0
    out, base = PAGE[way](own, BASE, who, x), functional_call(plain, BASE, (x,))
    same = (out - base).abs().amax(1) < 1e-12
    assert same.equal(who == 2)


@pytest.mark.parametrize("make", ["module_of", "merged_of"])
def test_the_loop_answers_each_sample_by_its_user(make):
    own, x, who = adapters(4), torch.randn(9, 784).double(), torch.arange(9) % 3
    networks = [PAGE[make](BASE, own, i) for i in range(4)]
    alone = torch.cat([networks[u](x[i : i + 1]) for i, u in enumerate(who.tolist())])
    out = PAGE["serve_by_loop"](networks, who, x)
    torch.testing.assert_close(out, alone, atol=1e-12, rtol=0)


class Products(TorchDispatchMode):
    """Shapes that enter products with two factors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if str(operator).startswith(("aten.mm.", "aten.addmm.", "aten.bmm.")):
            self.seen.append([tuple(a.shape) for a in args])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_one_product_with_a_frozen_weight_for_all_samples(way):
    with Products() as products:
        PAGE[way](
            adapters(6), BASE, torch.arange(30) % 6, torch.randn(30, 784).double()
        )
    assert len(products.seen) == 9, products.seen  # three layers, three products
    for weight in "024":
        out, inner = BASE[f"{weight}.weight"].shape
        found = [s for s in products.seen if (30, inner) in s and (inner, out) in s]
        assert len(found) == 1, products.seen


def test_bytes_held_between_steps_and_taken_during_one():
    PAGE["base"] = {name: p.float() for name, p in BASE.items()}
    peaks = {}
    for name, step in PAGE["forms"](64).items():
        step()
        optimizer = step.args[2]
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = [[p, p.grad, *optimizer.state[p].values()] for p in weights]
        held = sum(tensor.nbytes for part in tensors for tensor in part)
        counted = 16 * sum(p.numel() for p in weights)
        assert counted <= held <= counted + 4 * len(weights), name  # a step's number
        if "loop" not in name:
            peaks[name] = peak_bytes(step)
    copies = peaks.pop("vmap, copies")
    assert max(peaks.values()) < copies / 10
