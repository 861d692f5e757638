"""Time series by a GRU-ODE: SNOpt against Adam and SGD (Liu, Chen and Theodorou, NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.race import Contender, Paper, Race, run_race
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher
from ocnopt.experiments.reproduce.untrained import beside_untrained
from ocnopt.experiments.watcher import Part

__all__ = ["CHARACTERS", "QUICK", "WORDS", "characters", "words"]

CLAIM = (
    "SNOpt converges faster than Adam and SGD in wall-clock time, and to a better test accuracy."
)
_NOTES = (
    "What lies outside the Neural ODE (a GRU cell and a linear head) is trained by Adam, whoever"
    " trains the Neural ODE, as in the paper's runs. The released code has learning rates 0.003 for"
    " it beside SNOpt and 0.001 or 0.003 beside Adam and SGD; here everyone is tried with the same"
    " three (*rest_lr*).",
    "The paper solves by dopri5, with a seminorm in the adjoint, between all observations; here"
    " every sixth is seen, and a step of the Runge-Kutta method of order 4 leads from each to the"
    " next, so that a step of training takes some 0.14 seconds rather than about ten. Gradients"
    " are by the adjoint equation, as in the paper.",
)


def _race(title: str, recipe: str, damping: float, **settings: Any) -> Race:
    """A race of the three, SNOpt with the released code's options."""
    rest = {"rest_lr": (0.003, 0.01, 0.03)}
    snopt = {"damping": damping, "update_every": 100, "sample_step": 1.0}
    return Race(
        title=title,
        base=TrainConfig(**RECIPES[recipe]),
        contenders=(
            Contender("Adam", "adam", (1e-4, 3e-4, 1e-3, 3e-3), also=rest),
            Contender("SGD", "sgd", (1e-3, 3e-3, 0.01, 0.03), {"momentum": 0.9}, rest),
            Contender("SNOpt", "snopt", (1e-3, 3e-3, 0.01, 0.03), snopt, rest),
        ),
        baseline="Adam",
        validation=0.15,
        claim=CLAIM,
        **settings,
    )


#: ArticularyWordRecognition.
WORDS = _race(
    "Articulated words by a GRU-ODE",
    "articulary-word-recognition-ode",
    damping=0.1,
    seeds=5,
    tuning_epochs=25,
    evaluate_every=1,
    paper=Paper(
        "read off the authors' figure, to about half a point and 15 s; all observations, batches of"
        " 256, 600 epochs.",
        {"Adam": 83.7, "SGD": 85.8, "SNOpt": 89.4},
        {
            60: {"Adam": 627, "SGD": 515, "SNOpt": 212},
            80: {"Adam": 1345, "SGD": 1106, "SNOpt": 467},
        },
    ),
    notes=(*_NOTES, "87 test samples: one of them is 1.1 points."),
)
#: Half of CharacterTrajectories.
CHARACTERS = _race(
    "Handwritten characters by a GRU-ODE",
    "character-trajectories-half-ode",
    damping=0.05,
    tuning_epochs=17,
    evaluate_every=1,
    notes=(
        *_NOTES,
        "The labelled half of the data, under a split of its own: no figure may be compared with"
        " published ones.",
    ),
)


def _quick(race: Race, tuning_epochs: int) -> Race:
    """A version of less than a minute, which is too short to tell much."""
    contenders = tuple(
        replace(c, lrs=c.lrs[2:3], also={"rest_lr": (0.003, 0.01)}) for c in race.contenders
    )
    base = replace(race.base, stride=12, method="midpoint", steps=60)
    notes = (*race.notes[:1], "A quick version, which sees few observations and trains briefly.")
    return replace(
        race,
        base=base,
        contenders=contenders,
        seeds=2,
        tuning_epochs=tuning_epochs,
        notes=notes,
    )


#: By the full version's title.
QUICK = {WORDS.title: _quick(WORDS, 5), CHARACTERS.title: _quick(CHARACTERS, 2)}


def words(settings: Settings, watcher: Watcher) -> Report:
    """Run the race on ArticularyWordRecognition.

    Raises:
        InputError: The data are not there, or a setting cannot be used.
    """
    return _run(WORDS, settings, watcher)


def characters(settings: Settings, watcher: Watcher) -> Report:
    """Run the race on half of CharacterTrajectories.

    Raises:
        InputError: The data are not there, or a setting cannot be used.
    """
    return _run(CHARACTERS, settings, watcher)


def _run(race: Race, settings: Settings, watcher: Watcher) -> Report:
    race = QUICK[race.title] if settings.quick else race
    race = replace(
        race,
        base=replace(race.base, data_root=settings.data_root),
        seeds=settings.seeds or race.seeds,
    )
    tried = sum(c.candidates for c in race.contenders) * race.tuning_seeds
    watcher.start(tried + (len(race.contenders) + 1) * race.seeds)
    report = run_race(settings, race, Part(watcher))
    return beside_untrained(report, race, settings, Part(watcher))
