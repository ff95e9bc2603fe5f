"""What plot_saving.py says in a clause, with the class of that page itself."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import stack_module_state

WANTED = ["tensors", "with_tensors", "check_members", "Ensemble", "take_rows"]
PAGE = names_of("training/plot_saving", *WANTED)
Ensemble, take_rows = PAGE["Ensemble"], PAGE["take_rows"]
Tied = names_of("training/plot_state", "Tied")["Tied"]


class Net(nn.Module):
    """That of the page, smaller, and with dropout, whose seed a file has to hold."""

    def __init__(self, p=0.0):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(p)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(self.drop(F.relu(self.norm(self.fc1(x)))))


N = 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nets(**options):
    return [Net(**options).double() for _ in range(N)]


def reloaded(state, **options):
    file = io.BytesIO()
    torch.save(state, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, **options), size


def train(ensemble, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (ensemble(x).sin() - x[:, :3]).square().mean(dim=(1, 2)).sum().backward()
        optimizer.step()


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- files ------------------------------------------------------------------------


def test_loaded_parameters_are_leaves_that_train():
    params, buffers = reloaded(stack_module_state(nets()))[0]
    assert all(p.is_leaf and p.requires_grad for p in params.values())
    assert not any(b.requires_grad for b in buffers.values())
    torch.optim.Adam(params.values())


def test_a_saved_view_of_a_row_takes_the_file_of_all_rows():
    params = {"weight": torch.randn(N, 100, 100)}
    sizes = [
        reloaded({"weight": weight})[1]
        for weight in (
            params["weight"],
            params["weight"][3],
            params["weight"][3].clone(),
        )
    ]
    assert sizes[1] > 0.99 * sizes[0]
    assert sizes[2] < 1.1 * sizes[0] / N


def test_a_resumed_run_has_the_bits_of_the_run_without_interruption():
    ensemble = Ensemble(nets(p=0.5))
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.01)
    train(ensemble, optimizer, range(10))
    states = [ensemble.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    states, _ = reloaded(states, map_location="cpu")
    train(ensemble, optimizer, range(10, 20))

    resumed = Ensemble(nets(p=0.5))
    resumed.load_state_dict(states[0])
    resumed_optimizer = torch.optim.Adam(resumed.parameters())
    resumed_optimizer.load_state_dict(states[1])
    torch.set_rng_state(states[2])
    train(resumed, resumed_optimizer, range(10, 20))
    assert equal(resumed.state_dict(), ensemble.state_dict())


def test_adams_step_stays_where_it_is_loaded_and_the_averages_move():
    # The meta device stands for a GPU.
    ensemble = Ensemble(nets())
    optimizer = torch.optim.Adam(ensemble.parameters())
    train(ensemble, optimizer, range(1))
    for place in ["cpu", "meta"]:
        state, _ = reloaded(optimizer.state_dict(), map_location=place)
        elsewhere = torch.optim.Adam(copy.deepcopy(ensemble).to("meta").parameters())
        elsewhere.load_state_dict(state)
        for entry in elsewhere.state.values():
            assert entry["exp_avg"].device.type == "meta"
            assert entry["step"].device.type == place


def test_a_state_that_lacks_a_tensor_or_a_member_is_refused():
    ensemble = Ensemble(nets())
    state = ensemble.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        ensemble.load_state_dict({name: t[:4] for name, t in state.items()})
    del state["stacked.fc2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc2\.bias"):
        ensemble.load_state_dict(state)


# --- the module -------------------------------------------------------------------


def test_members_are_the_models_that_went_in_and_share_no_memory():
    models = nets()
    ensemble = Ensemble(models)
    for i, model in enumerate(models):
        member = ensemble.member(i)
        assert type(member) is Net
        assert equal(member.state_dict(), model.state_dict())
        nn.init.zeros_(member.fc1.weight)
        assert equal(ensemble.member(i).state_dict(), model.state_dict())


def test_own_minibatches_equal_the_loop_in_train_mode():
    models, x = nets(), torch.randn(N, 32, 6, dtype=torch.float64)
    ensemble = Ensemble(models)
    together = ensemble(x, in_dim=0)
    alone = torch.stack([m(rows) for m, rows in zip(models, x, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)
    expected = Ensemble(models).state_dict()
    torch.testing.assert_close(ensemble.state_dict(), expected, atol=1e-10, rtol=0)


def test_the_module_moves_switches_and_freezes_as_a_whole():
    models = nets()
    for model in models:
        model.fc1.requires_grad_(False)
    ensemble = Ensemble(models).float().eval()
    member = ensemble.member(2)
    assert not member.training
    assert not member.norm.training
    assert member.fc1.weight.dtype == torch.float32
    assert member.norm.num_batches_tracked.dtype == torch.int64
    frozen = [name for name, p in member.named_parameters() if not p.requires_grad]
    assert frozen == ["fc1.weight", "fc1.bias"]
    assert {p.device.type for p in ensemble.to("meta").parameters()} == {"meta"}


def test_tied_weights_stay_tied():
    models, tokens = [Tied().double() for _ in range(N)], torch.arange(11)
    ensemble = Ensemble(models)
    for tied in (ensemble.stacked, ensemble.member(1)):
        assert tied.head.weight is tied.embed.weight
    expected = torch.stack([model(tokens) for model in models])
    torch.testing.assert_close(ensemble(tokens), expected, atol=1e-10, rtol=0)


def test_it_holds_lstms_although_vmap_does_not_run_them():
    models = [nn.LSTM(3, 4) for _ in range(N)]
    member, x = Ensemble(models).member(3), torch.randn(7, 2, 3)
    assert torch.equal(member(x)[0], models[3](x)[0])


def sequence(activation=nn.ReLU, p=0.5, width=8, **options):
    return nn.Sequential(nn.Linear(6, width, **options), activation(), nn.Dropout(p))


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([sequence(), sequence(width=9)], r"0.bias: \[9\]"),
        ([sequence(bias=False), sequence()], r"0.bias: \[8\]"),
        ([sequence(), sequence(dtype=torch.float64)], "torch.float64"),
        ([sequence(), sequence(nn.Tanh)], r"\(1\): Tanh"),
        ([sequence(), sequence(p=0.1)], "p=0.1"),
    ],
    ids=["shape", "a bias more", "dtype", "activation", "dropout"],
)
def test_models_that_do_not_match_are_refused_by_name(models, says):
    with pytest.raises(ValueError, match=says):
        Ensemble([sequence(), *models] if models[0][0].bias is not None else models)


def test_stack_module_state_drops_the_bias_that_the_first_model_lacks():
    params, _ = stack_module_state([nn.Linear(6, 3, bias=False), nn.Linear(6, 3)])
    assert params.keys() == {"weight"}


# --- members that come and go -----------------------------------------------------


def test_an_old_optimizer_trains_nothing_and_says_nothing():
    ensemble = Ensemble(nets())
    optimizer = torch.optim.Adam(ensemble.parameters())
    changed = Ensemble([ensemble.member(i) for i in (0, 2, 3)])
    before = {name: p.clone() for name, p in changed.named_parameters()}
    train(changed, optimizer, range(3))
    assert equal(dict(changed.named_parameters()), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
        lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True),
    ],
    ids=["SGD", "SGD with momentum", "AdamW with amsgrad", "RMSprop"],
)
def test_those_who_stay_train_on_undisturbed_with_every_elementwise_optimizer(make):
    ensemble = Ensemble(nets())
    optimizer = make(ensemble.parameters())
    train(ensemble, optimizer, range(10))
    stay = [3, 0, 4]
    changed = Ensemble([*(ensemble.member(i) for i in stay), *nets()[:2]])
    state = take_rows(optimizer.state_dict(), stay, num_new=2)
    for entry in state["state"].values():  # those who come begin with nothing
        assert not any(t[3:].any() for t in entry.values() if t.ndim)
    changed_optimizer = make(changed.parameters())
    changed_optimizer.load_state_dict(state)
    for pair in [(ensemble, optimizer), (changed, changed_optimizer)]:
        train(*pair, range(10, 20))
    for name, tensor in ensemble.state_dict().items():
        found = changed.state_dict()[name][:3]
        torch.testing.assert_close(found, tensor[stay], atol=1e-10, rtol=0)


def test_in_a_long_run_a_newcomers_steps_are_three_to_seven_times_too_long():
    ratios = {}
    for count in [0, 10**6]:
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([p], lr=1.0, eps=0)
        p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the state: no average moves, the count becomes 1
        p.data.zero_()
        optimizer.state[p]["step"].fill_(count)
        for step in range(1, 2001):
            before = p.item()
            p.grad.normal_(generator=torch.Generator().manual_seed(step))
            optimizer.step()
            ratios.setdefault(step, []).append(p.item() - before)
    ratios = {step: late / fresh for step, (fresh, late) in ratios.items()}
    assert 3.1 < ratios[1] < 3.2
    assert 6.4 < max(ratios.values()) < 6.6
    assert max(ratios, key=ratios.get) in range(10, 15)
    assert 1.05 < ratios[2000] < 1.1


# --- export -----------------------------------------------------------------------


@torch.no_grad()
def test_the_exported_program_computes_what_the_ensemble_computes():
    ensemble, x = Ensemble(nets()).eval(), torch.randn(32, 6, dtype=torch.float64)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # releases warn of what they do themselves
        program = torch.export.export(ensemble, (x,))
        torch.export.save(program.run_decompositions({}), file)
        file.seek(0)
        program = torch.export.load(file)
    found = program.module()(x)
    torch.testing.assert_close(found, ensemble(x), atol=1e-10, rtol=0)
    assert equal(program.state_dict, ensemble.state_dict())
