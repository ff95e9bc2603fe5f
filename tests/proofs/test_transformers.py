"""What plot_transformers.py says in a clause."""

import warnings
from functools import partial

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = names_of("uses/plot_transformers", device=torch.device("cpu"))
Reader, draw = PAGE["Reader"], PAGE["draw"]
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
math = sdpa_kernel(SDPBackend.MATH)


@pytest.fixture(autouse=True)
def switch():
    warnings.filterwarnings("ignore", "There is a performance drop")
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def ensemble(build, number=3):
    models = [build().double() for _ in range(number)]
    with torch.device("meta"):
        skeleton = build()
    return models, stack_module_state(models)[0], partial(functional_call, skeleton)


kernels = pytest.mark.parametrize("kernel", [lambda call: call, math])


@kernels
def test_train_mode_without_dropout(kernel):
    models, params, call = ensemble(lambda: Reader(dropout=0.0).train())
    x, padding, _ = draw(3, 5)
    out = kernel(vmap(call))(params, (x, padding))
    loop = torch.stack([m(*row) for m, *row in zip(models, x, padding, strict=True)])
    close(out, loop)
    (out.sin().sum() + loop.sin().sum()).backward()
    for name, weight in params.items():
        close(weight.grad, torch.stack([m.get_parameter(name).grad for m in models]))


def encoders(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return lambda: nn.TransformerEncoder(layer, 2, **options).eval()


def test_causal_masks_and_masks_of_each_model():
    models, params, call = ensemble(encoders(enable_nested_tensor=False))
    x, causal = torch.randn(3, 4, 6, 8).double(), torch.ones(6, 6).triu(1).bool()
    loop = torch.stack([m(row, causal) for m, row in zip(models, x, strict=True)])
    close(vmap(lambda p, x: call(p, (x, causal)))(params, x), loop)
    inside = vmap(lambda p, x: call(p, (x, torch.ones(6, 6).triu(1).bool())))
    close(inside(params, x), loop)
    own = torch.stack([causal, causal.roll(1, 0) & causal, causal & False])
    rows = zip(models, x, own, strict=True)
    loop = torch.stack([m(row, mask, is_causal=False) for m, row, mask in rows])
    given = {"is_causal": False}
    close(vmap(lambda p, x, m: call(p, (x, m), given))(params, x, own), loop)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(lambda p, x, m: call(p, (x, m)))(params, x, own)


def test_same_randomness_drops_the_same_units():
    x = torch.ones(3, 4, 6)
    dropped = vmap(lambda x: nn.functional.dropout(x), randomness="same")(x)
    assert (dropped == dropped[:1]).all()
    dropped = vmap(lambda x: nn.functional.dropout(x), randomness="different")(x)
    assert not (dropped == dropped[:1]).all()


@kernels
def test_autocast_around_the_call(kernel):
    models, params, call = ensemble(lambda: Reader().eval())
    models = [m.float() for m in models]
    params = {name: p.float() for name, p in params.items()}
    x, padding, _ = draw(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernel(vmap(call))(params, (x, padding))
        loop = torch.stack([m(*i) for m, *i in zip(models, x, padding, strict=True)])
    assert (out.dtype, loop.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(out, loop.float(), atol=0.03, rtol=0)  # of bfloat16


def test_eval_mode_with_the_fast_path():
    torch.backends.mha.set_fastpath_enabled(True)
    warnings.simplefilter("always")
    _, params, call = ensemble(encoders(enable_nested_tensor=False))
    x, padding = torch.randn(3, 4, 6, 8).double(), torch.rand(3, 4, 6) < 0.5
    with pytest.warns(UserWarning, match="_transformer_encoder_layer_fwd"):
        out = vmap(call)(params, (x,))
    with pytest.raises(RuntimeError, match="derivative for aten::_transformer_enc"):
        out.sum().backward()
    _, params, nested = ensemble(encoders())
    with pytest.raises(RuntimeError, match="_nested_tensor_from_mask_left_aligned"):
        vmap(lambda p, x, m: nested(p, (x, None, m)))(params, x, padding)
    torch.backends.mha.set_fastpath_enabled(False)
    out = vmap(lambda p, x, m: nested(p, (x, None, m)))(params, x, padding)
    out[~padding].sum().backward()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_warns_of_a_loop_unless_it_is_math(mode):
    _, params, call = ensemble(lambda: getattr(Reader(dropout=0.0), mode)())
    inputs = draw(3, 5)[:2]
    warnings.simplefilter("always")
    with pytest.warns(UserWarning, match="drop.*flash_attention_for_cpu"):
        vmap(call)(params, inputs)
    warnings.simplefilter("error")
    math(vmap(call))(params, inputs).sum().backward()


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names = getattr(self, "names", set()) | {str(operator)}
        return operator(*args, **(kwargs or {}))


def test_fused_attention_of_a_cpu_has_no_dropout():
    x, padding, _ = draw(1, 5)
    for dropout in 0.0, 0.1:
        with Seen() as seen:
            Reader(dropout=dropout).train()(x[0], padding[0])
        fused = any("flash_attention_for_cpu" in name for name in seen.names)
        assert fused == (dropout == 0)
    with Seen() as seen, math:
        Reader(dropout=0.0)(x[0], padding[0])
    assert not any("flash" in name for name in seen.names)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_takes_the_models_as_rows():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    qkv = torch.randn(3, 3, 2, 4, 128, 16)  # q, k, v: [models, batch, heads, ...]
    with pytest.raises(Exception, match=r"TransformType|fake tensor"):
        vmap(flex_attention)(*qkv)
    lengths, rows = torch.tensor([100, 50, 128, 30, 60, 90]), qkv.flatten(1, 2)
    mask = create_block_mask(
        lambda b, h, i, j: j < lengths[b], 6, None, 128, 128, device="cpu"
    )
    seen = (torch.arange(128) < lengths[:, None])[:, None, None]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*rows, attn_mask=seen)
    torch.testing.assert_close(flex_attention(*rows, block_mask=mask), expected)
