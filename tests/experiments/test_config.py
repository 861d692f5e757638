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
        ({"dataset": "cifar"}, "digits, wine"),
        ({"lr": 0.0}, "positive"),
        ({"lr": float("nan")}, "positive"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": -1}, "batch-size"),
        ({"seed": -1}, "seed"),
        ({"widths": ()}, "widths"),
        ({"network": "cnn", "widths": (3,)}, "--network fcn"),
        ({"network": "cnn", "dataset": "wine"}, "needs images"),
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
    assert TrainConfig(network="cnn").resolved().widths is None


def test_json_round_trip(tmp_path):
    config = TrainConfig(
        widths=(4, 3), options={"betas": (0.9, 0.99)}, optimizer="adam", data_root=tmp_path
    ).resolved()
    again = TrainConfig(**from_json(config.to_json()))
    assert again.to_json() == config.to_json()
    assert again.widths == (4, 3)
    assert again.data_root == tmp_path
    assert config.differences(again.to_json()) == []


def test_only_what_changes_the_computation_counts_as_a_difference():
    kept = TrainConfig(seed=1, steps=5, threads=1).resolved().to_json()
    assert TrainConfig(seed=1, steps=9, threads=2).resolved().differences(kept) == []
    assert TrainConfig(seed=2).resolved().differences(kept) == ["seed: 1, not 2"]
