"""What two pages say of models of Hugging Face (make test-all)."""

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

pytestmark = pytest.mark.slow
B, S = 3, 8


def build(kind, attention):
    import transformers

    if kind == "BERT":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        sizes |= {"vocab_size": 50, "num_attention_heads": 4}
        config = transformers.BertConfig(**sizes)
        kind = transformers.BertForSequenceClassification
    else:
        sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        kind = transformers.GPT2LMHeadModel
    return kind._from_config(config, attn_implementation=attention).eval()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["BERT", "GPT-2"])
def test_logits_and_masks(kind, attention):
    models = [build(kind, attention).double() for _ in range(4)]
    state = stack_module_state(models)
    with torch.device("meta"):
        skeleton = build(kind, attention)

    def logits(params, buffers, x, mask):
        given = {"attention_mask": mask}
        call = functional_call(skeleton, (params, buffers), (x,), given, strict=True)
        return call.logits

    x = torch.randint(50, (4, B, S))
    mask = torch.arange(S) < torch.randint(1, S + 1, (4, B, 1))
    rows = zip(models, x, mask.long(), strict=True)
    loop = torch.stack([m(row, attention_mask=seen).logits for m, row, seen in rows])

    def distance(mask):
        apart = (vmap(logits)(*state, x, mask) - loop).abs()
        return (apart[seen] if kind == "GPT-2" else apart).max()

    seen, booleans = mask, mask[:, :, None, None, :]
    if kind == "GPT-2":
        booleans = booleans & torch.ones(S, S).tril().bool()
    floats = torch.zeros(booleans.shape, dtype=torch.float64, device="cpu")
    assert (
        distance(floats.masked_fill(~booleans, torch.finfo(floats.dtype).min)) < 1e-12
    )
    assert (distance(booleans) > 1e-6) == (attention == "eager")
    if (kind, attention) == ("GPT-2", "eager"):  # the others refuse this mask
        assert distance(mask.long()) < 1e-12
    else:
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            vmap(logits)(*state, x, mask.long())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_is_refused(attention):
    models = [build("GPT-2", attention) for _ in range(3)]
    skeleton = torch.nn.ModuleDict({"gpt": models[0]})
    skeleton.forward = lambda x: models[0].generate(
        x, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0
    )
    params, buffers = stack_module_state(models)
    state = {f"gpt.{name}": value for name, value in (params | buffers).items()}
    x = torch.randint(1, 50, (3, B, S))
    assert models[0].generate(x[0], max_new_tokens=4).shape[0] == B  # without vmap
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(lambda state, x: functional_call(skeleton, state, (x,)))(state, x)
