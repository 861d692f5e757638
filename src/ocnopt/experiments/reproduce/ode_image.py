"""Images by a Neural ODE: SNOpt against Adam and SGD (Liu, Chen and Theodorou, NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.race import Contender, Paper, Race, run_race
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher

__all__ = ["CIFAR", "MNIST", "QUICK", "RACES", "RELEASED", "WHOLE", "ImageRace", "race"]


@dataclass(frozen=True, kw_only=True)
class ImageRace(Race):
    """A race whose candidates are tried for some steps, not for whole epochs.

    Attributes:
        tuning_steps: How many.
    """

    tuning_steps: int

    @property
    def tuning(self) -> TrainConfig:
        """What candidates' runs share."""
        return replace(super().tuning, steps=self.tuning_steps)


def _contenders(
    adam: tuple[float, ...], sgd: tuple[float, ...], snopt: Contender
) -> tuple[Contender, ...]:
    """SNOpt is tried with two values of one more option, and so with half as many rates."""
    return (
        Contender("Adam", "adam", adam),
        Contender("SGD", "sgd", sgd, {"momentum": 0.9}),
        snopt,
    )


#: Of SNOpt on images, as in the paper's runs.
_EVERYWHERE = {"update_every": 100, "precondition_all": True}


def _race(
    title: str,
    recipe: str,
    papers_epochs: int,
    adam: tuple[float, ...],
    snopt: tuple[float, ...],
    more: tuple[str, ...] = (),
    **settings: Any,
) -> ImageRace:
    notes = (
        "The network is the paper's, solved by dopri5 at tolerances of 0.001, but with 15"
        " channels in place of 64; and runs are the beginning of the paper's, of"
        f" {papers_epochs} epochs.",
        "SNOpt preconditions the layers outside the Neural ODE, too, as the paper's runs on"
        " images do, and renews its factors every 100 steps. It has a momentum of 0.9, as SGD"
        " has, where the released code has none, and looks at points 0.1 apart in time, not"
        " 0.01: a tenth of the cost.",
        "A step of training costs what the solver's steps cost, and these become more as a"
        " network learns: who learns faster soon has dearer steps.",
        *more,
    )
    return ImageRace(
        title=title,
        base=TrainConfig(**RECIPES[recipe]),
        contenders=_contenders(
            adam=adam,
            sgd=(0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
            snopt=Contender(
                "SNOpt",
                "snopt",
                snopt,
                {**_EVERYWHERE, "sample_step": 0.1, "momentum": 0.9},
                {"damping": (0.05, 0.2)},
            ),
        ),
        baseline="Adam",
        validation=0.05,
        evaluate_every=0.1,
        # As long as the final runs: a rate that is best after 100 steps may fail soon after them.
        tuning_steps=RECIPES[recipe]["steps"],
        notes=notes,
        **settings,
    )


#: The data set whose training the paper's figure shows.
CIFAR = _race(
    "CIFAR-10 by a Neural ODE",
    "cifar-10-ode",
    20,
    adam=(5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3),
    snopt=(0.002, 0.005, 0.01),
    more=(
        "Adam at rates of 0.01 and 0.02 was tried and left out: at 0.02 nothing was learned, and at"
        " 0.01 the field became so steep that the run was given up.",
    ),
    claim=(
        "SNOpt converges faster than Adam and SGD in wall-clock time, and to a better test"
        " accuracy."
    ),
    paper=Paper(
        "read off the authors' figure, to about half a point and 15 s; 64 channels, 20 epochs.",
        {"Adam": 77.3, "SGD": 76.4, "SNOpt": 79.1},
        {
            60: {"Adam": 158, "SGD": 284, "SNOpt": 82},
            70: {"Adam": 425, "SGD": 565, "SNOpt": 168},
            75: {"Adam": 712, "SGD": 894, "SNOpt": 267},
        },
    ),
)
#: A data set that can be learned in so few steps.
MNIST = _race(
    "MNIST by a Neural ODE",
    "mnist-ode",
    5,
    adam=(5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    snopt=(0.005, 0.01, 0.02),
    claim="SNOpt converges faster than Adam and SGD in wall-clock time.",
)
#: As the paper's code runs it: nothing is tuned.
RELEASED = replace(
    MNIST,
    title="MNIST by a Neural ODE, at the released settings",
    contenders=(
        Contender("Adam", "adam", (1e-3,)),
        Contender("SGD", "sgd", (0.02,), {"momentum": 0.9}),
        Contender(
            "SNOpt",
            "snopt",
            (0.02,),
            {
                "damping": 0.05,
                "update_every": 100,
                "sample_step": 0.01,
                "precondition_all": True,
            },
        ),
    ),
    notes=(
        "Learning rates, momentum, damping and points in time are those of the code that was"
        " released with the paper; `ode-mnist` chooses them for every method alike.",
        *MNIST.notes[:1],
        *MNIST.notes[2:],
    ),
)
_RULE = {"damping": 0.05, "update_every": 100}
_SHARED = {"sample_step": 0.1, "momentum": 0.9}
#: What feedback adds outside of the Neural ODE, all else alike.
WHOLE = ImageRace(
    title="MNIST by a Neural ODE: OCNOpt beside SNOpt",
    base=TrainConfig(**{**RECIPES["mnist-ode"], "steps": 300}),
    contenders=(
        Contender(
            "SNOpt",
            "snopt",
            (0.005, 0.01, 0.02),
            {**_RULE, **_SHARED, "precondition_all": True},
        ),
        Contender(
            "OCNOpt",
            "ocnopt",
            (0.005, 0.01, 0.02),
            {"preconditioner": {"name": "ekfac", "decay": 0.0, **_RULE}, **_SHARED},
        ),
    ),
    baseline="SNOpt",
    validation=0.05,
    evaluate_every=0.1,
    tuning_steps=300,
    notes=(
        "The network of `ode-mnist`. Both treat the Neural ODE alike; outside of it SNOpt takes"
        " EKFAC's steps, and OCNOpt the same with feedback: the layers behind the Neural ODE"
        " answer what the layers before it have done.",
    ),
)
#: The small version of all, which needs no files.
QUICK = ImageRace(
    title="DIGITS by a Neural ODE",
    base=TrainConfig(dataset="digits", network="ode-cnn", channels=7, batch_size=64, steps=44),
    contenders=_contenders(
        adam=(5e-3, 0.02),
        sgd=(0.05, 0.2),
        snopt=Contender(
            "SNOpt",
            "snopt",
            (0.02,),
            {**_EVERYWHERE, "sample_step": 0.1, "momentum": 0.9},
            {"damping": (0.05, 0.2)},
        ),
    ),
    baseline="Adam",
    tuning_steps=22,
    seeds=2,
    notes=("A quick version, on small images, which trains briefly.",),
)


#: By experiment.
RACES = {"ode-image": CIFAR, "ode-mnist": MNIST, "ode-released": RELEASED, "ode-whole": WHOLE}
#: The small version of the last.
QUICK_WHOLE = replace(
    QUICK,
    title="DIGITS by a Neural ODE: OCNOpt beside SNOpt",
    contenders=tuple(replace(c, lrs=c.lrs[1:]) for c in WHOLE.contenders),
    baseline=WHOLE.baseline,
)


def race(settings: Settings, watcher: Watcher) -> Report:
    """Run the race that the settings name.

    Raises:
        InputError: The data are not there, or a setting cannot be used.
    """
    quick = QUICK_WHOLE if settings.name == "ode-whole" else QUICK
    return run_race(settings, quick if settings.quick else RACES[settings.name], watcher)
