"""What plot_more_recipes.py says of torch_geometric and torchdiffeq (make test-all)."""

import re

import pytest
import torch
import torch.nn.functional as F
from pages import text_of
from torch.func import functional_call, stack_module_state, vmap

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)  # on the CPU
    yield
    torch.set_default_dtype(torch.float32)


KINDS = ["SAGEConv", "TransformerConv", "GCNConv", "GATConv", "GATv2Conv"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_torch_geometric(kind):
    from torch_geometric import nn, utils

    def build(**options):
        return getattr(nn, kind)(8, 4, **options).eval()

    def run(params, *graph):
        return functional_call(skeleton, params, graph, strict=True)

    layers = [build() for _ in range(4)]
    params, _ = stack_module_state(layers)
    skeleton = build().to("meta")
    x, edges = torch.randn(12, 8), torch.randint(12, (2, 30))
    out = vmap(run, in_dims=(0, None, None))(params, x, edges)
    loop = torch.stack([layer(x, edges) for layer in layers])
    torch.testing.assert_close(out, loop, **EXACT)

    graphs = [(torch.randn(n, 8), torch.randint(n, (2, 3 * n))) for n in range(9, 13)]
    nodes, most = 13, 50  # one node more, and room for self-loops

    def padded(graphs):
        for x, edges, *weights in graphs:
            gap = most - edges.shape[1]
            rows = F.pad(x, (0, 0, 0, nodes - len(x)))
            ends = F.pad(edges, (0, gap), value=nodes - 1)
            yield rows, ends, *[F.pad(weight, (0, gap)) for weight in weights]

    def together(graphs):
        return vmap(run)(params, *map(torch.stack, zip(*padded(graphs), strict=True)))

    given = graphs
    if kind not in KINDS[:2]:
        with pytest.raises(RuntimeError, match="can support dynamic shape"):
            together(graphs)
        if kind == "GCNConv":
            skeleton = build(normalize=False).to("meta")
            given = [
                (x, *nn.conv.gcn_conv.gcn_norm(edges, None, len(x)))
                for x, edges in graphs
            ]
        else:
            skeleton = build(add_self_loops=False).to("meta")
            given = [
                (
                    x,
                    utils.add_self_loops(
                        utils.remove_self_loops(e)[0], None, None, len(x)
                    )[0],
                )
                for x, e in graphs
            ]
    for layer, graph, out in zip(layers, graphs, together(given), strict=True):
        torch.testing.assert_close(out[: len(graph[0])], layer(*graph), **EXACT)


def test_the_worst_member_decides_in_torchdiffeq():
    text = text_of("uses/plot_more_recipes")
    (block,) = re.findall(r"block:: none\n#\n((?:#(?:    .*)?\n)+)", text)
    code = re.sub(r"^#(    )?", "", block, flags=re.MULTILINE)
    x, rates, calls = torch.randn(20, 2), torch.logspace(0, 1, 10), []

    def slope(rate, z):  # circles, from slow to fast
        calls.append(rate)
        return rate * torch.stack([z[..., 1], -z[..., 0]], dim=-1)

    names = {"vmap": vmap, "torch": torch, "x": x}
    names |= {"predict": slope, "params": rates, "num_models": 10}

    def try_it(code):
        calls.clear()
        exec(code.replace(")[-1]", ", rtol=1e-3, atol=1e-3)[-1]"), names)
        turned = torch.stack(
            [x[:, 0] * cos + x[:, 1] * sin, x[:, 1] * cos - x[:, 0] * sin], dim=1
        )
        fastest = names["out"][-1] if names["out"].dim() == 3 else names["out"]
        return len(calls), (fastest - turned).abs().max()

    cos, sin = rates[-1].cos(), rates[-1].sin()
    worst = try_it(code)
    mean = try_it(code.replace(', options={"norm": worst}', ""))
    one = code.replace("vmap(predict)(params, z)", "predict(params[-1], z)")
    one = one.replace("x.expand(num_models, -1, -1)", "x")
    alone = try_it(one.replace(', options={"norm": worst}', ""))
    assert worst[0] == alone[0] > mean[0]
    assert worst[1] < 1.01 * alone[1] < 0.5 * mean[1]
