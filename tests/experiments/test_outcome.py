import json
import math

import pytest
import torch

from ocnopt.experiments.outcome import CAP, Outcome, make_outcome


def outcome(history, **settings):
    given = {
        "seed": 3,
        "history": torch.as_tensor(history, dtype=torch.float32),
        "per_epoch": 2,
        "diverged_step": None,
        "accuracy": 0.75,
        "seconds_per_step": 0.5,
        "accuracies": [(2, 0.5), (3, 0.75)],
        "curve": True,
    }
    return make_outcome(**{**given, **settings})


def test_the_loss_is_the_last_epochs_mean():
    found = outcome([9.0, 1.0, 2.0])
    assert found.train_loss == 1.5
    assert (found.steps, found.seed, found.test_accuracy, found.failed) == (3, 3, 0.75, False)
    assert outcome([9.0, 1.0], per_epoch=100).train_loss == 5.0


def test_divergence_counts_as_the_cap_and_nothing_counts_for_more():
    assert CAP == 5
    diverged = outcome([1.0, math.nan], diverged_step=2)
    assert diverged.train_loss is None and diverged.failed
    assert diverged.capped_loss == CAP
    assert outcome([7.0]).capped_loss == CAP
    assert outcome([7.0]).train_loss == 7.0
    assert outcome([0.5]).capped_loss == 0.5
    # A step that is refused may have had a good loss.
    assert outcome([1.0, 1.0], diverged_step=2).failed


def test_json_round_trip():
    for found in (
        outcome([1.0, 2.0]),
        outcome([1.0, math.nan], diverged_step=2),
        outcome([1.0], curve=False),
        outcome([1.0, 2.0], clock=[(0, 0.0, 0.0), (2, 0.25, 0.5)]),
    ):
        assert Outcome.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    "kept", [{}, {"losses": [], "accuracies": []}, {"losses": 1, "accuracies": []}, [], "x", None]
)
def test_other_json_is_refused(kept):
    with pytest.raises((TypeError, KeyError)):
        Outcome.from_json(kept)


def test_a_field_too_many_is_refused():
    with pytest.raises(TypeError):
        Outcome.from_json({**outcome([1.0]).to_json(), "colour": 1})


def test_curves_are_kept_where_asked_for():
    assert outcome([1.0, 2.0]).losses == ((1, 1.0), (2, 2.0))
    assert outcome([1.0, 2.0]).accuracies == ((2, 0.5), (3, 0.75))
    assert outcome([1.0, 2.0], curve=False).losses == ()
    assert outcome([1.0, 2.0], curve=False).accuracies == ()


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (100, 100), (101, 51), (1500, 100)])
def test_long_curves_are_thinned_to_means(steps, points):
    history = torch.arange(steps, dtype=torch.float32)
    losses = outcome(history).losses
    assert len(losses) == points
    assert losses[-1][0] == steps
    every = math.ceil(steps / 100)
    assert losses[0] == (every, pytest.approx(float(history[:every].mean())))
    last = history[(points - 1) * every :]
    assert losses[-1][1] == pytest.approx(float(last.mean()))


def test_points_that_are_no_number_are_left_out():
    assert outcome([1.0, math.inf, math.nan], diverged_step=2).losses == ((1, 1.0),)
