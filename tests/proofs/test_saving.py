"""What plot_saving.py says in a clause, with the classes of that page itself."""

import io
import warnings
from functools import partial

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import stack_module_state

WANTED = ["Net", "tensors", "with_tensors", "check_members", "Ensemble", "take_rows"]
PAGE = names_of("training/plot_saving", *WANTED)
Net, Ensemble = PAGE["Net"], PAGE["Ensemble"]
Tied = names_of("training/plot_state", "Tied")["Tied"]
N = 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nets():
    return [Net().double() for _ in range(N)]


def reloaded(state):
    """The state as a file gives it back, and the size of the file."""
    file = io.BytesIO()
    torch.save(state, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file), size


def train(ensemble, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 64, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (ensemble(x).sin() - x[:, :10]).square().mean(dim=(1, 2)).sum().backward()
        optimizer.step()


def test_a_saved_view_of_a_row_takes_the_file_of_all_rows():
    weight = torch.randn(N, 100, 100)
    sizes = [reloaded(t)[1] for t in (weight, weight[3], weight[3].clone())]
    assert sizes[1] > 0.99 * sizes[0]
    assert sizes[2] < 1.1 * sizes[0] / N


def test_a_resumed_run_has_the_bits_of_the_run_without_interruption():
    ensemble = Ensemble(nets())
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.01)
    train(ensemble, optimizer, range(10))
    states, _ = reloaded([ensemble.state_dict(), optimizer.state_dict()])
    train(ensemble, optimizer, range(10, 20))

    resumed = Ensemble(nets())
    resumed.load_state_dict(states[0])
    resumed_optimizer = torch.optim.Adam(resumed.parameters())
    resumed_optimizer.load_state_dict(states[1])
    train(resumed, resumed_optimizer, range(10, 20))
    found, expected = dict(resumed.state_dict()), dict(ensemble.state_dict())
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_minibatch_for_each_member():
    models, x = nets(), torch.randn(N, 32, 64, dtype=torch.float64)
    together = Ensemble(models)(x, in_dim=0)
    alone = torch.stack([m(rows) for m, rows in zip(models, x, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)


def test_the_module_moves_switches_and_freezes_as_a_whole():
    models = nets()
    for model in models:
        model.fc1.requires_grad_(False)
    ensemble = Ensemble(models).float().eval()
    member = ensemble.member(2)
    assert not member.norm.training
    assert member.fc1.weight.dtype == torch.float32
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


def test_other_dtypes_and_layers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"torch\.float64"):
        Ensemble([nn.Linear(6, 8), nn.Linear(6, 8).double()])
    with pytest.raises(ValueError, match=r"p=0\.1"):
        Ensemble([nn.Dropout(0.5), nn.Dropout(0.1)])


def test_stack_module_state_drops_the_bias_that_the_first_model_lacks():
    params, _ = stack_module_state([nn.Linear(6, 3, bias=False), nn.Linear(6, 3)])
    assert params.keys() == {"weight"}


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.RMSprop, lr=0.01),
    ],
)
def test_those_who_stay_train_on_undisturbed_with_other_optimizers(make):
    ensemble = Ensemble(nets())
    optimizer = make(ensemble.parameters())
    train(ensemble, optimizer, range(10))
    stay = [3, 0, 4]
    changed = Ensemble([*(ensemble.member(i) for i in stay), *nets()[:2]])
    changed_optimizer = make(changed.parameters())
    state = PAGE["take_rows"](optimizer.state_dict(), stay, num_new=2)
    changed_optimizer.load_state_dict(state)
    for pair in [(ensemble, optimizer), (changed, changed_optimizer)]:
        train(*pair, range(10, 20))
    for name, tensor in ensemble.state_dict().items():
        found = changed.state_dict()[name][:3]
        torch.testing.assert_close(found, tensor[stay], atol=1e-10, rtol=0)


def test_in_a_long_run_a_newcomers_steps_are_three_to_seven_times_too_long():
    lengths = {}
    for count in [0, 10**6]:
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([p], lr=1.0, eps=0)
        p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the state: no average moves, the count becomes 1
        p.data.zero_()
        optimizer.state[p]["step"].fill_(count)
        path = []
        for step in range(20):
            p.grad.normal_(generator=torch.Generator().manual_seed(step))
            optimizer.step()
            path.append(p.item())
        lengths[count] = torch.tensor(path).diff(prepend=torch.zeros(1))
    ratios = lengths[10**6] / lengths[0]
    assert 3.1 < ratios[0] < 3.2
    assert 6.4 < ratios[11] < 6.6


def exported(ensemble, x, **options):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # releases warn of themselves
        program = torch.export.export(ensemble, (x,), **options)
        torch.export.save(program.run_decompositions({}), file)
        file.seek(0)
        return torch.export.load(file).module()


@torch.no_grad()
def test_the_exported_program_computes_what_the_ensemble_computes():
    ensemble, x = Ensemble(nets()).eval(), torch.randn(32, 64, dtype=torch.float64)
    found = exported(ensemble, x)(x)
    torch.testing.assert_close(found, ensemble(x), atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_batch_may_vary_if_members_consist_of_linear_layers():
    dynamic = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}}
    linear = [nn.Sequential(nn.Linear(64, 8), nn.ReLU()).double() for _ in range(3)]
    ensemble, x = Ensemble(linear).eval(), torch.randn(32, 64, dtype=torch.float64)
    found = exported(ensemble, x, **dynamic)(x[:5])
    torch.testing.assert_close(found, ensemble(x[:5]), atol=1e-10, rtol=0)
    with pytest.raises(Exception, match="specialized it to be a constant"):
        exported(Ensemble(nets()).eval(), x, **dynamic)
