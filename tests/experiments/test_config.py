import json
from dataclasses import replace

import pytest

from ocnopt.experiments.config import TrainConfig, from_json
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.options import parse_options, parse_widths


def test_options_are_literals_or_words():
    parsed = parse_options(
        [
            "momentum=0.9",
            "bellman=share",
            "betas=(0.9, 0.99)",
            "nesterov=true",
            "feedback-clip=None",
        ]
    )
    assert parsed == {
        "momentum": 0.9,
        "bellman": "share",
        "betas": (0.9, 0.99),
        "nesterov": True,
        "feedback_clip": None,
    }


@pytest.mark.parametrize("text", ["momentum", "=1", "a b=1", ""])
def test_option_without_a_name_or_value_is_refused(text):
    with pytest.raises(InputError, match="key=value"):
        parse_options([text])


def test_option_given_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        parse_options(["a=1", "a=2"])


def test_widths():
    assert parse_widths("32, 16") == (32, 16)
    with pytest.raises(InputError, match="whole numbers"):
        parse_widths("32,x")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dataset": "cifar"}, "digits, wine.*or give your own as module:function"),
        (
            {"network": "rnn"},
            "fcn, cnn, residual-fcn, .*ode-cnn, gru-ode.*or give your own as module:function",
        ),
        ({"optimizer": "lion"}, "ddpnopt, dgnopt, kfac.*or give your own as package.module:Class"),
        ({"activation": "gelu"}, "tanh, relu, sigmoid$"),
        ({"activation": "mine:gelu"}, "tanh, relu, sigmoid$"),
        ({"head": "softmax"}, "identity, sigmoid$"),
        ({"optimizer": "torch.optim:Adagrad"}, "needs a learning rate; give it with --lr"),
        ({"validation": 1.0}, r"validation must be a share in \[0, 1\), not 1.0"),
        ({"validation": -0.1}, "validation"),
        ({"network": "cnn", "channels": 0}, "channels must be at least 1"),
        ({"network": "cnn", "hidden": 0}, "hidden must be at least 1"),
        ({"network": "cnn", "pools": (2, 2)}, "pools must be two of 1 to 4"),
        ({"network": "cnn", "pools": (0, 2)}, "pools must be two of 1 to 4"),
        ({"network": "cnn", "pools": (2, 5)}, "pools must be two of 1 to 4"),
        ({"network": "cnn", "pools": (1, 2, 3)}, "pools must be two of 1 to 4"),
        ({"channels": 3, "hidden": 4}, "channels belongs to --network cnn, ode-cnn, not to fcn"),
        ({"depth": 2}, "depth belongs to --network residual-fcn, residual-cnn, not to fcn"),
        (
            {"network": "residual-fcn", "norm": "batch"},
            "norm belongs to --network residual-cnn, in",
        ),
        (
            {"network": "inception", "activation": "tanh"},
            "activation belongs to --network fcn, res",
        ),
        ({"network": "residual-cnn", "norm": "layer"}, "norm 'layer' is not.*none, batch, group$"),
        ({"network": "residual-fcn", "depth": 0}, "depth must be at least 1"),
        ({"network": "mine:net", "head": "sigmoid"}, "head belongs to --network fcn, not to mine"),
        ({"network": "mine:net", "pools": (1, 2)}, "pools belongs to --network cnn"),
        ({"evaluate_every": 0.0}, "evaluate-every must be a positive number of epochs, not 0.0"),
        ({"evaluate_every": float("inf")}, "evaluate-every"),
        ({"lr": 0.0}, "positive"),
        ({"lr": float("nan")}, "positive"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": -1}, "batch-size"),
        ({"seed": -1}, "seed"),
        ({"widths": ()}, "widths"),
        ({"network": "cnn", "widths": (3,)}, "widths belongs to --network fcn, res.*, not to cnn"),
        ({"network": "cnn", "dataset": "wine"}, "needs images"),
        ({"network": "cnn", "dataset": "clusters"}, "needs images"),
        ({"network": "inception", "dataset": "wine"}, "--network fcn or residual-fcn"),
        ({"resume": True}, "--output"),
    ],
)
def test_bad_settings_fail_at_once(settings, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**settings)


def test_defaults_are_filled_in_by_data_set_and_optimizer():
    config = TrainConfig(dataset="digits", optimizer="adam").resolved()
    assert (config.batch_size, config.epochs, config.steps) == (8, 10, None)
    assert (config.widths, config.activation, config.lr) == ((32, 32, 32, 16), "tanh", 0.001)
    assert TrainConfig(steps=7).resolved().epochs is None
    cnn = TrainConfig(network="cnn").resolved()
    assert (cnn.widths, cnn.activation, cnn.head, cnn.threads) == (None, None, None, None)
    assert (cnn.channels, cnn.hidden, cnn.pools) == (32, 128, (2, 4))
    assert (config.channels, config.hidden, config.pools) == (None, None, None)
    assert (config.head, config.threads) == ("identity", 1)
    assert config.resolved() == config


def test_networks_of_blocks_have_defaults_of_their_own():
    config = TrainConfig(dataset="mnist", network="residual-fcn").resolved()
    assert (config.widths, config.depth, config.activation) == ((32, 32, 24, 16), 2, "relu")
    assert (config.norm, config.head, config.threads) == (None, None, 1)
    config = TrainConfig(network="residual-cnn", norm="group", depth=3).resolved()
    assert (config.widths, config.depth, config.norm) == ((16, 32, 64), 3, "group")
    assert (config.activation, config.threads) == (None, None)
    config = TrainConfig(network="inception").resolved()
    assert (config.widths, config.depth, config.norm) == ((16, 32), None, "none")
    assert TrainConfig(**from_json(config.to_json())) == config


def test_what_a_user_brings_has_defaults_too():
    config = TrainConfig(dataset="mine:data").resolved()
    assert (config.batch_size, config.widths, config.activation) == (32, (32,) * 4, "relu")
    config = TrainConfig(network="mine:net", optimizer="mine:Opt", lr=0.5).resolved()
    assert (config.widths, config.channels, config.threads) == (None, None, None)
    assert (config.batch_size, config.lr) == (8, 0.5)


def test_json_round_trip(tmp_path):
    config = TrainConfig(
        widths=(4, 3), options={"betas": (0.9, 0.99)}, optimizer="adam", data_root=tmp_path
    ).resolved()
    again = TrainConfig(**from_json(config.to_json()))
    assert again.to_json() == config.to_json()
    assert again.widths == (4, 3)
    assert again.data_root == tmp_path
    assert config.differences(again.to_json()) == []
    config = TrainConfig(network="cnn", pools=(1, 3), validation=0.2, curve=True).resolved()
    again = TrainConfig(**from_json(config.to_json()))
    assert (again.pools, again.validation, again.curve) == ((1, 3), 0.2, True)
    assert again == config


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="do not exist: colour"):
        from_json({"colour": 1})


def test_only_what_changes_the_computation_counts_as_a_difference():
    kept = TrainConfig(seed=1, steps=5, threads=1).resolved().to_json()
    later = TrainConfig(seed=1, steps=9, threads=2, curve=True, log_every=7).resolved()
    assert later.differences(kept) == []
    assert replace(later, evaluate_every=0.5).differences(kept) == []
    held = TrainConfig(seed=1, validation=0.2).resolved()
    assert held.differences(kept) == ["validation: 0.0, not 0.2"]
    assert TrainConfig(seed=2).resolved().differences(kept) == ["seed: 1, not 2"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "fast"),
        ("lr", True),
        ("widths", 3),
        ("widths", ["a"]),
        ("steps", 2.5),
        ("seed", None),
        ("options", []),
        ("data_root", 3),
        ("activation", 1),
        ("network", None),
    ],
)
def test_a_damaged_value_in_a_file_is_named(name, value):
    kept = json.loads(json.dumps(TrainConfig().resolved().to_json()))
    from_json(kept)
    with pytest.raises(InputError, match=f"config.json is damaged: {name} cannot be"):
        from_json({**kept, name: value})
