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
LOOP = "serve_in_each_layer"


def adapters(number):
    made = PAGE["random_adapters"](number)
    return {name: p.double() for name, p in made.items()}


@pytest.mark.parametrize("way", [*WAYS, LOOP])
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


@pytest.mark.parametrize("users", [1, 6])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_products_for_any_number_of_users(way, users):
    who, x = torch.arange(30) % users, torch.randn(30, 784).double()
    with Products() as products:
        PAGE[way](adapters(users), BASE, who, x)
    assert len(products.seen) == 9, products.seen  # three layers, three products
    for weight in "024":
        out, inner = BASE[f"{weight}.weight"].shape
        found = [s for s in products.seen if (30, inner) in s and (inner, out) in s]
        assert len(found) == 1, products.seen


def test_a_step_of_many_users_does_not_copy_the_base():
    PAGE["base"] = {name: p.float() for name, p in BASE.items()}
    copies = 64 * sum(p.nbytes for p in PAGE["base"].values())
    for name, step in PAGE["forms"](64).items():
        step()
        if "loop" not in name:
            assert peak_bytes(step) < copies / 10, name


def saved_by_peft(own, i, scaling):
    """Names and shapes of a file that PEFT writes."""
    return {
        f"base_model.model.{name[:-1]}lora_{name[-1]}.weight": (
            p[i] / scaling if name.endswith(".B") else p[i]
        )
        for name, p in own.items()
    }


def test_adapters_from_peft_are_stacked():
    own = adapters(3)
    files = [saved_by_peft(own, i, 2.0) for i in range(3)]
    torch.testing.assert_close(PAGE["from_peft"](files, 2.0), own)
    fewer = [{k: p for k, p in file.items() if ".0." in k} for file in files]
    zeros = {name: torch.zeros_like(p) for name, p in own.items()}
    filled = zeros | PAGE["from_peft"](fewer, 2.0)
    x, who = torch.randn(3, 784).double(), torch.arange(3)
    rest = {n: p if n.startswith("0.") else zeros[n] for n, p in own.items()}
    out = [PAGE["serve"](part, BASE, who, x) for part in (filled, rest)]
    torch.testing.assert_close(*out)


@pytest.mark.slow
def test_peft_itself_answers_the_same(tmp_path):
    """PEFT is installed by `make test-all` only."""
    import peft
    from safetensors.torch import load_file

    network, names = build().double(), ["first", "second", "third"]
    network.load_state_dict(BASE)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    config = peft.LoraConfig(target_modules=["0", "2", "4"], **options)
    model = peft.get_peft_model(network, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.double().eval().save_pretrained(tmp_path)
    files = [tmp_path / name / "adapter_model.safetensors" for name in names]
    own = PAGE["from_peft"]([load_file(file) for file in files], scaling=8 / 4)
    own = {name: p.double() for name, p in own.items()}
    x, who = torch.randn(7, 784).double(), torch.arange(7) % 3
    mixed = model(x, adapter_names=[names[i] for i in who])
    for way in [*WAYS, LOOP]:
        torch.testing.assert_close(
            PAGE[way](own, BASE, who, x), mixed, atol=1e-12, rtol=0
        )
    assert (mixed - functional_call(plain, BASE, (x,))).abs().max() > 1e-3
