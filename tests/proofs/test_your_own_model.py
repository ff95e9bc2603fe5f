"""plot_your_own_model.py: its questions, asked of many kinds of modules."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from pages import functions_of, names_of, text_of
from torch import nn

ASK = "to_device loss_of run accepts ask Operators loops without_dropout loop apart"
PAGE = names_of(
    "basics/plot_your_own_model", *ASK.split(), "distance", "stack", "megabytes"
)
PAGE["device"] = torch.device("cpu")
IMAGE, ROWS, TIMES = torch.randn(2, 4, 8, 8), torch.randn(3, 8), torch.randn(2, 5, 8)
TOKENS = torch.randint(10, (2, 5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class Branches(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        return x if x.mean() > 0 else -x


class Several(nn.Linear):
    def __init__(self, *sizes, rate=0.0):
        super().__init__(*sizes)
        self.rate_of_all = rate

    def forward(self, x):
        x = super().forward(x)
        dropped = F.dropout(x, self.rate_of_all, self.training)
        return {"mean": x.mean(), "both": (x, dropped)}


class Masked(nn.MultiheadAttention):
    def forward(self, x, mask):  # hands a keyword on
        return super().forward(x, x, x, key_padding_mask=mask, need_weights=True)[0]


def attention():
    return Masked(8, 2, batch_first=True)


MASK = torch.tensor([[False, False, False, True, True], [False] * 5])


def weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))


ACCEPTED = {
    "Linear": (lambda: nn.Linear(8, 4), ROWS),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 4), ROWS, ROWS),
    "PReLU": (lambda: nn.PReLU(), ROWS),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3), TIMES),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3), IMAGE),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), IMAGE),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 3, stride=2), IMAGE),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "LayerNorm": (lambda: nn.LayerNorm(8), ROWS),
    "RMSNorm": (lambda: nn.RMSNorm(8), ROWS),
    "Embedding": (lambda: nn.Embedding(10, 4), TOKENS),
    "Dropout": (lambda: nn.Sequential(nn.Linear(8, 4), nn.Dropout()), ROWS),
    "max pooling": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)), IMAGE),
    "adaptive": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)),
        IMAGE,
    ),
    "Upsample": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(12)), IMAGE),
    "PixelShuffle": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2)),
        IMAGE,
    ),
    "GELU": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Softmax(-1)), ROWS),
    "GRUCell": (lambda: nn.GRUCell(8, 4), ROWS),
    "Attention": (
        lambda: nn.MultiheadAttention(8, 2, 0.1, batch_first=True),
        *[TIMES] * 3,
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), TIMES),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(8, 2, 8, batch_first=True),
        TIMES,
        TIMES,
    ),
    "tied": (Tied, TOKENS),
    "several outputs": (lambda: Several(8, 4), ROWS),
}
REFUSED = {
    "LSTM": (lambda: nn.LSTM(8, 4), TIMES),
    "GRU": (lambda: nn.GRU(8, 4), TIMES),
    "RNN": (lambda: nn.RNN(8, 4), TIMES),
    "LSTMCell": (lambda: nn.LSTMCell(8, 4), ROWS),
    "weight norm": (weight_norm, ROWS),  # a class of its own for each model
    "if": (lambda: Branches(8, 4), ROWS),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(action="ignore"):
        yield


TASKS = pytest.mark.parametrize("train", [False, True], ids=["predict", "train"])


@TASKS
@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted_and_equal(kind, train):
    build, *batch = ACCEPTED[kind]
    assert PAGE["accepts"](build, tuple(batch), train) == "accepted"
    assert PAGE["distance"](build, tuple(batch), train) < 1e-10


@TASKS
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_words(kind, train):
    build, *batch = REFUSED[kind]
    words = PAGE["ask"](PAGE["accepts"], build, tuple(batch), train)
    known = "Batching rule not implemented", "control flow", "of the same class"
    assert any(part in words for part in known), words


def test_random_numbers_outside_of_modules_are_no_distance():
    build, x = (lambda: Several(8, 4, rate=0.5)), (ROWS,)
    assert "two runs of the loop differ" in PAGE["ask"](
        PAGE["distance"], build, x, True
    )
    assert PAGE["distance"](build, x, False) < 1e-10


def test_a_batch_of_its_own_for_each_model():
    page = "basics/plot_your_own_model"
    words = re.sub(r"\n# ", " ", text_of(page))
    (returned,) = re.findall(r"``(lambda b: .+?)``", words)
    code = functions_of(page, "stack").replace("in_dims=(0, 0, None)", "in_dims=0")
    code, number = re.subn(r"partial\(every, \*state\)", returned, code)
    assert number == 1
    own = {**PAGE}
    exec(code, own)
    for build, batch in (lambda: nn.Linear(8, 4), (ROWS,)), (attention, (TIMES, MASK)):
        _, (params, buffers), call = own["stack"](build, 3, double=True)
        _, _, shared = PAGE["stack"](build, 3, double=True)
        assert call.__name__ == "<lambda>"
        given = tuple(t.double() if t.is_floating_point() else t for t in batch)
        apart = PAGE["apart"](call(given), shared.func(params, buffers, given))
        assert apart < 1e-12


def test_a_result_that_is_no_number_is_no_agreement():
    there, nowhere = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert not PAGE["apart"]([there, nowhere], [there, there]) < 1e-10


def test_a_hidden_loop_is_named():
    build = ACCEPTED["encoder"][0]
    looping = PAGE["loops"](build, (TIMES,), train=False)
    assert looping == "aten._transformer_encoder_layer_fwd.default"
    assert PAGE["loops"](ACCEPTED["Linear"][0], (ROWS,), train=True) == "none"


def test_what_training_keeps():
    build = ACCEPTED["Linear"][0]  # 36 weights, and nothing but its input is needed
    assert PAGE["megabytes"](build, (ROWS,)) * 1e6 == 4 * 36 * 4 + 3 * 4 * 4  # a square
