"""torch's schedulers and parameter groups, by name, prefix, module or tensor."""

import copy

import numpy as np
import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_updates_close,
    assert_weights_close,
    assert_weights_equal,
    batch,
    mlp,
    run,
    step,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import ocnopt
from ocnopt.curvature import KFAC

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.7**i),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "warm": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.CosineAnnealingLR(o, 4)],
        milestones=[2],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scheduler_sets_the_rate_of_the_step(name, scheduler):
    """Equal to setting the same rates by hand."""
    one, two = mlp(), mlp()
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first = OPTIMIZERS[name](one, criterion, momentum=0.5)
    second = OPTIMIZERS[name](two, own, momentum=0.5)
    schedule = SCHEDULERS[scheduler](first)
    rates = []
    for i in range(6):
        group = first.param_groups[0]
        rates.append(group["lr"])
        moved = {key: group[key] for key in ("lr", "momentum", "betas") if key in group}
        second.param_groups[0].update(moved)
        x, y = batch(seed=i)
        step(one, first, criterion, x, y)
        schedule.step()
        step(two, second, own, x, y)
    assert len(set(rates)) > 2
    assert_weights_equal(one, two)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduled_run_equals_sgd(scheduler):
    mine = mlp()
    theirs = copy.deepcopy(mine)
    first = ocnopt.DDPNOpt(mine, None, lr=0.1, momentum=0.5, bellman="off", rollout="off")
    second = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.5)
    for model, optimizer in ((mine, first), (theirs, second)):
        schedule = SCHEDULERS[scheduler](optimizer)
        for i in range(6):
            run(model, optimizer, 1, start=i)
            schedule.step()
    assert_weights_close(mine, theirs, 1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reduce_on_plateau(name):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    lr = optimizer.param_groups[0]["lr"]
    for value in (1.0, 2.0):
        run(model, optimizer, 1, criterion)
        schedule.step(value)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * lr)
    state = schedule.state_dict()
    schedule.load_state_dict(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rate_of_zero_moves_nothing(name):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, lr=0.0)
    before = weights(model)
    run(model, optimizer, 2, criterion)
    assert_weights_equal(before, model)


def spec(model, how):
    return {
        "name": ["0.weight", "0.bias"],
        "prefix": "0",
        "module": model[0],
        "tensor": [model[0].weight, model[0].bias],
        "mixed": ["0.weight", model[0].bias],
        "generator": model[0].parameters(),
    }[how]


@pytest.mark.parametrize("how", ["name", "prefix", "module", "tensor", "mixed", "generator"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ways_to_name_a_group(name, how):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    groups = [{"params": spec(model, how), "lr": 0.003, "weight_decay": 0.5}]
    optimizer = OPTIMIZERS[name](model, criterion, params=groups)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model[0].parameters()
    ]
    assert len(optimizer.param_groups) == 2
    assert len(optimizer.param_groups[1]["params"]) == 4
    reference = mlp()
    own = nn.CrossEntropyLoss()
    other = OPTIMIZERS[name](
        reference, own, params=[{"params": "0", "lr": 0.003, "weight_decay": 0.5}]
    )
    run(model, optimizer, 3, criterion)
    run(reference, other, 3, own)
    assert_weights_equal(model, reference)


@pytest.mark.parametrize("kind", ["identity", "rmsprop", "adam"])
def test_options_of_groups_reduce_to_the_lender(kind):
    lender, rule, extra = {
        "identity": (torch.optim.SGD, "identity", {}),
        "rmsprop": (torch.optim.RMSprop, ocnopt.curvature.RMSprop(eps=1e-3), {"eps": 1e-3}),
        "adam": (torch.optim.Adam, ocnopt.curvature.Adam(eps=1e-3), {"eps": 1e-3}),
    }[kind]
    mine = mlp()
    theirs = copy.deepcopy(mine)
    momentum = {} if kind == "adam" else {"momentum": 0.7}
    first = {"lr": 0.002, "weight_decay": 0.3, **momentum}
    second = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = ocnopt.DDPNOpt(
        mine,
        None,
        lr=0.005,
        preconditioner=rule,
        bellman="off",
        rollout="off",
        params=[{"params": "0", **first}, {"params": ["2.bias", "4.bias"], **second}],
    )
    reference = lender(
        [
            {"params": theirs[0].parameters(), **first},
            {"params": [theirs[2].bias, theirs[4].bias], **second},
            {"params": [theirs[2].weight, theirs[4].weight]},
        ],
        lr=0.005,
        **extra,
    )
    run(mine, optimizer, 10)
    run(theirs, reference, 10)
    assert_weights_close(mine, theirs, 1e-12)


def test_feedback_clip_per_group():
    """A bound of (almost) zero on one layer turns that layer's feedback off, and no other's."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(
        model, criterion, lr=0.1, params=[{"params": "2", "feedback_clip": 1e-12}]
    )
    run(model, optimizer, 1, criterion)
    rows = optimizer.diagnostics.players
    assert rows["2"].feedback_share < 1e-11 and rows["2"].clipped_share == 1.0
    assert rows["4"].feedback_share > 1e-3


def test_bias_and_weight_with_rates_of_their_own():
    """The Gram matrix takes both rates: equal to the layer at one rate when they are equal."""
    criterion = nn.CrossEntropyLoss()
    one, two = mlp(), mlp()
    start = weights(one)
    split = [{"params": ["0.bias", "2.bias", "4.bias"], "lr": 0.1}]
    first = ocnopt.DDPNOpt(one, criterion, lr=0.1, params=split)
    run(one, first, 3, criterion)
    own = nn.CrossEntropyLoss()
    run(two, ocnopt.DDPNOpt(two, own, lr=0.1), 3, own)
    assert_updates_close(start, one, two, 1e-12)
    other = mlp()
    third = ocnopt.DDPNOpt(other, criterion, lr=0.1, params=[{**split[0], "lr": 0.05}])
    run(other, third, 3, criterion)
    assert_feedback_active(third)
    assert not torch.equal(other[0].weight, one[0].weight)


def test_equal_rates_in_tensors_of_their_own_are_equal():
    def groups(bias):
        return [
            {"params": "0.weight", "lr": torch.tensor(0.1)},
            {"params": "0.bias", "lr": torch.tensor(bias)},
        ]

    criterion, model, other = nn.CrossEntropyLoss(), mlp(), mlp()
    tensors = ocnopt.DDPNOpt(model, criterion, lr=0.2, preconditioner="kfac", params=groups(0.1))
    run(model, tensors, 2, criterion)
    plain = [{"params": "0", "lr": float(torch.tensor(0.1))}]
    own = nn.CrossEntropyLoss()
    run(other, ocnopt.DDPNOpt(other, own, lr=0.2, preconditioner="kfac", params=plain), 2, own)
    assert_weights_equal(model, other)
    with pytest.raises(ocnopt.OptionError, match="different learning rates"):
        ocnopt.DDPNOpt(mlp(), None, lr=0.2, preconditioner="kfac", params=groups(0.3))


def test_options_may_be_numpys_numbers_and_checkpoints_stay_plain(tmp_path):
    number = np.float32(0.25)
    names = ("lr", "momentum", "weight_decay", "feedback_clip")
    groups = [{"params": "0", "lr": np.float64(0.5), "momentum": np.int64(0)}]
    optimizer = ocnopt.DDPNOpt(mlp(), None, **dict.fromkeys(names, number), params=groups)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [optimizer.param_groups[1][name] for name in names] == [0.25] * 4
    assert [optimizer.param_groups[0][name] for name in names[:2]] == [0.5, 0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preconditioner_per_group(name):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    groups = [
        {"params": "0", "preconditioner": "identity"},
        {"params": "2", "preconditioner": ocnopt.curvature.Adam(eps=0.1)},
    ]
    optimizer = OPTIMIZERS[name](model, criterion, params=groups)
    x, y = batch()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert "exp_avg" in optimizer.state[model[2].weight]
    assert "exp_avg" not in optimizer.state[model[0].weight]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_group_added_later(name):
    """Unfreezing a layer: a parameter that was not there when the optimizer was built."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model, criterion)
    run(model, optimizer, 2, criterion)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": "0", "lr": 0.001})
    before = weights(model)
    x, y = batch()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not torch.equal(before["0.weight"], model[0].weight)
    rows = {r.parameter: r for r in optimizer.coverage()}
    assert rows["0.weight"].treatment == "player" or rows["0.weight"].reason
    assert set(rows) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "params,message",
    [
        ([{"params": "nothing"}], "nothing"),
        ([{"params": ["0.weigth"]}], "did you mean '0.weight'"),
        ([{"params": 3}], "cannot read 3"),
        ([{"lr": 0.1}], "params"),
        (["0"], "expected groups"),
        (5, "expected groups such as .*, got int"),
        (nn.Linear(2, 2), "expected groups such as .*, got Linear"),
        (torch.tensor(1.0), "expected groups such as .*, got Tensor"),
        ([{"params": "0"}, {"params": "0.weight"}], "in groups 0 and 1"),
        ([{"params": "0", "lr": -1.0}], "lr"),
        ([{"params": "0", "momentum": 1.0}], "momentum"),
        ([{"params": "0", "weight_decay": -0.1}], "weight_decay"),
        ([{"params": "0", "feedback_clip": 0.0}], "feedback_clip"),
        ([{"params": "0", "preconditioner": "newton"}], "newton"),
        ([{"params": "0.bias", "preconditioner": "adam"}], "'0'"),
        ([{"params": "0.bias", "preconditioner": "identity", "learning_rate": 1}], "learning_rate"),
    ],
    ids=str,
)
def test_errors_name_what_is_wrong(params, message):
    with pytest.raises(ocnopt.OptionError, match=message):
        ocnopt.DDPNOpt(mlp(), None, lr=0.1, params=params)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"lr": -1.0}, "lr"),
        ({"bellman": "none"}, "bellman"),
        ({"rollout": "none"}, "rollout"),
        ({"terminal": "none"}, "terminal"),
        ({"terminal": "matched"}, "criterion"),
        ({"preconditioner": "newton"}, "newton"),
        ({"preconditioner": {"name": "adam", "beta": 1}}, "beta"),
        ({"preconditioner": {"name": "adam", "betas": 1}}, "preconditioner 'adam'"),
        ({"preconditioner": {"name": ["adam"]}}, "is not known; choose one of"),
        ({"preconditioner": KFAC}, r"KFAC'> is not known.* an object .*, such as KFAC\("),
        ({"preconditioner": None}, "preconditioner=None is not known"),
        ({"preconditioner": 5}, "preconditioner=5 is not known"),
        ({"reduction": "none"}, "reduction"),
        ({"measure_every": 1}, "criterion"),
        ({"measure_every": -1}, "measure_every"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"momentum": "much"}, "momentum"),
        ({"momentum": np.bool_(True)}, "momentum"),
        ({"lr": True}, "lr=True, but it must be a number"),
    ],
    ids=str,
)
def test_bad_options_fail_in_the_constructor(options, message):
    with pytest.raises(ocnopt.OptionError, match=message):
        ocnopt.DDPNOpt(mlp(), None, **{"lr": 0.1, **options})


@pytest.mark.parametrize("model", [[], None, "model", list(mlp().parameters())])
def test_parameters_instead_of_the_model(model):
    with pytest.raises(ocnopt.OptionError, match=r"nn\.Module"):
        ocnopt.DDPNOpt(model, lr=0.1)


def test_nothing_to_train():
    with pytest.raises(ocnopt.OptionError):
        ocnopt.DDPNOpt(nn.Tanh(), lr=0.1)
    with pytest.raises(ocnopt.OptionError, match="forward"):
        ocnopt.DDPNOpt(nn.LazyLinear(3), lr=0.1)
