"""What plot_generate.py says in a clause."""

from functools import partial

import pytest
import torch
from pages import names_of, text_of
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE = names_of("uses/plot_generate", PAD=0, END=1, device=torch.device("cpu"))
generate, GPT = PAGE["generate"], PAGE["GPT"]
math = sdpa_kernel(SDPBackend.MATH)


@pytest.fixture
def trio():
    models = [GPT().double() for _ in range(3)]
    with torch.device("meta"):
        skeleton = GPT()
    return models, PAGE["stacked_call"](skeleton, models)[0]


def keep(seen, logits):
    seen.append(logits)
    return PAGE["greedy"](logits)


def prompts():
    tokens = torch.randint(2, 40, (3, 4, 6))
    return tokens.masked_fill(torch.arange(6) < torch.randint(6, (3, 4, 1)), 0)


def test_tokens_and_logits_are_those_of_a_loop_of_cached_models(trio):
    models, call = trio
    tokens, found = prompts(), []
    for way in call, PAGE["in_a_loop"](models):
        seen = []
        texts = generate(way, tokens, partial(keep, seen), 20)
        found.append((texts, torch.stack(seen)))
    (texts, logits), (texts_alone, logits_alone) = found
    assert texts.equal(texts_alone)
    torch.testing.assert_close(logits, logits_alone, atol=1e-12, rtol=0)


def test_sampled_texts_with_the_same_noise_are_those_of_a_loop(trio):
    models, call = trio
    tokens, found = prompts(), []
    for way in call, PAGE["in_a_loop"](models):
        torch.manual_seed(1)
        found.append(generate(way, tokens, PAGE["sample"], 20))
    assert found[0].equal(found[1])


def test_sample_draws_with_the_probabilities_of_the_softmax():
    logits = torch.randn(1, 1, 5).expand(3, 100_000, -1)
    drawn = torch.bincount(PAGE["sample"](logits, 2.0).flatten(), minlength=5) / 3e5
    wanted = (logits[0, 0] / 2.0).softmax(-1)
    torch.testing.assert_close(drawn, wanted, atol=0.005, rtol=0)
    drawn = torch.bincount(PAGE["sample"](logits, top_k=2).flatten(), minlength=5) / 3e5
    best = logits[0, 0].topk(2)
    wanted = torch.zeros(5).scatter(0, best.indices, best.values.softmax(-1))
    torch.testing.assert_close(drawn, wanted, atol=0.005, rtol=0)


def test_texts_end_with_their_end_token(trio):
    _, call = trio
    ends = torch.tensor([3, 5, 8]).view(3, 1).expand(3, 4)
    count = iter(range(100))

    def choose(logits):
        step = next(count)
        return torch.where(ends == step, 1, 7)

    texts = generate(call, prompts(), choose, 20)
    assert texts.shape == (3, 4, 9)  # all have ended
    places = torch.arange(9)
    wanted = torch.where(places < ends[..., None], 7, 0)
    assert texts.equal(torch.where(places == ends[..., None], 1, wanted))


def test_a_cache_of_fixed_length_is_a_mapped_argument():
    def write(keys, cache):
        cache[:, :1] = keys
        return cache.sum()

    keys, caches = torch.randn(3, 2, 1), torch.zeros(3, 2, 8)
    out = vmap(write)(keys, caches)
    torch.testing.assert_close(out, keys.sum((1, 2)))
    assert caches[:, :, :1].equal(keys)
    with pytest.raises(RuntimeError, match=r"inplace arithmetic.* is not possible"):
        vmap(lambda keys: write(keys, torch.zeros(2, 8)))(keys)


def test_training_without_a_cache_gives_the_gradients_of_a_loop():
    models = [GPT().double() for _ in range(3)]
    params, _ = stack_module_state(models)
    with torch.device("meta"):
        skeleton = GPT()
    tokens = prompts()
    one = math(vmap(lambda p, *x: functional_call(skeleton, p, x, strict=True)[0]))
    loop = torch.stack([m(t, t != 0)[0] for m, t in zip(models, tokens, strict=True)])
    (one(params, tokens, tokens != 0).sin().sum() + loop.sin().sum()).backward()
    for name, weight in params.items():
        alone = torch.stack([m.get_parameter(name).grad for m in models])
        torch.testing.assert_close(weight.grad, alone, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_one_model_that_trains_eight_times_as_long():
    text = text_of("uses/plot_generate")
    last = text.index("# Each model writes its own texts")
    first, after = [text.index(w) for w in ("def team(", "\n# ``+-`` is one")]
    text = text[:last] + "\n" + text[first:after]
    for old, new in ("num_models = 8", "num_models = 1"), ("range(150)", "range(1200)"):
        assert old in text
        text = text.replace(old, new)
    names = {}
    exec(text, names)
    assert names["together"].mean() > 0.87  # what eight together reach
