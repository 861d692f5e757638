"""Images by Neural ODEs: SNOpt against Adam and SGD (Liu, Chen and Theodorou, NeurIPS 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.data.locate import missing_files
from ocnopt.experiments.data.sets import SETS
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.race import Contender, Paper, Race, run_race
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher
from ocnopt.experiments.watcher import Part

__all__ = ["QUICK", "RACES", "ImageRace", "run"]

CLAIM = (
    "SNOpt converges faster than Adam and SGD in wall-clock time, and to a better test accuracy on"
    " CIFAR-10."
)
NOTES = (
    "The network is the paper's (dopri5 at tolerances of 0.001), but of 15 channels for its 64, and"
    " trained for a fraction of an epoch where the paper has 5 epochs (MNIST) or 20 (CIFAR-10).",
    "SNOpt preconditions the layers outside the Neural ODE, too, as the paper's runs on images do;"
    " damping 0.05, factors every 100 steps from points 0.01 apart in time. The released code has"
    " no momentum for it; here 0 and 0.9 are among the candidates.",
    "A step costs what the solvers' steps cost, which grow as a network learns: whoever learns"
    " faster has dearer steps.",
)


@dataclass(frozen=True, kw_only=True)
class ImageRace(Race):
    """A race whose candidates are tried for some steps, not whole epochs.

    Attributes:
        tuning_steps: How many.
    """

    tuning_steps: int

    @property
    def tuning(self) -> TrainConfig:
        """What candidates' runs share."""
        return replace(super().tuning, steps=self.tuning_steps)


def _contenders(
    adam: tuple[float, ...], sgd: tuple[float, ...], snopt: tuple[float, ...]
) -> tuple[Contender, ...]:
    """SNOpt's rates are tried with two momenta, so that it has half as many of them."""
    return (
        Contender("Adam", "adam", adam),
        Contender("SGD", "sgd", sgd, {"momentum": 0.9}),
        Contender(
            "SNOpt",
            "snopt",
            snopt,
            {"damping": 0.05, "update_every": 100, "sample_step": 0.01, "precondition_all": True},
            {"momentum": (0.0, 0.9)},
        ),
    )


_GRIDS = _contenders(
    adam=(5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    sgd=(0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
    snopt=(0.01, 0.02, 0.05),
)
#: By data set.
RACES: Mapping[str, ImageRace] = {
    "mnist": ImageRace(
        title="MNIST",
        base=TrainConfig(**RECIPES["mnist-ode"]),
        contenders=_GRIDS,
        baseline="Adam",
        tuning_steps=100,
        validation=0.05,
        evaluate_every=0.125,
        claim=CLAIM,
        notes=NOTES,
    ),
    "cifar-10": ImageRace(
        title="CIFAR-10",
        base=TrainConfig(**RECIPES["cifar-10-ode"]),
        contenders=_GRIDS,
        baseline="Adam",
        tuning_steps=100,
        validation=0.05,
        evaluate_every=0.125,
        claim=CLAIM,
        paper=Paper(
            "read off the authors' figure, to about half a point and 15 s; 64 channels, 20 epochs.",
            {"Adam": 77.3, "SGD": 76.4, "SNOpt": 79.1},
            {
                60: {"Adam": 158, "SGD": 284, "SNOpt": 82},
                70: {"Adam": 425, "SGD": 565, "SNOpt": 168},
                75: {"Adam": 712, "SGD": 894, "SNOpt": 267},
            },
        ),
        notes=NOTES,
    ),
}
#: The small version, which needs no files.
QUICK: Mapping[str, ImageRace] = {
    "digits": ImageRace(
        title="DIGITS",
        base=TrainConfig(dataset="digits", network="ode-cnn", channels=7, batch_size=64, steps=44),
        contenders=_contenders((5e-3, 0.02), (0.05, 0.2), (0.05,)),
        baseline="Adam",
        tuning_steps=22,
        seeds=2,
        evaluate_every=0.25,
        claim=CLAIM,
        notes=("In place of MNIST and CIFAR-10, and too short to tell much.",),
    ),
}


def run(settings: Settings, watcher: Watcher) -> Report:
    """Run the races whose data are there, and put their pages together.

    Raises:
        InputError: No data are there, or a setting cannot be used.
    """
    races = QUICK if settings.quick else _present(settings)
    watcher.start(sum(_runs(race, settings) for race in races.values()))
    reports = {
        name: run_race(_part(settings, place), race, Part(watcher))
        for place, (name, race) in enumerate(races.items())
    }
    first = next(iter(reports.values()))
    titles = {name: race.title for name, race in races.items()}
    sentences = [f"{titles[name]}: {report.sentence}" for name, report in reports.items()]
    page = ["# Neural ODEs on images", "", *sentences, ""]
    page += [_lowered(report.page) for report in reports.values()]
    return Report(
        first.columns,
        [[f"{titles[n]}, {row[0]}", *row[1:]] for n, r in reports.items() for row in r.table],
        " ".join(sentences),
        "\n".join(page),
        [{"dataset": name, **row} for name, r in reports.items() for row in r.rows],
        {"races": {name: report.facts for name, report in reports.items()}},
    )


def _runs(race: Race, settings: Settings) -> int:
    """How many there are."""
    tuning = race.contenders[0].candidates * race.tuning_seeds
    return len(race.contenders) * (tuning + (settings.seeds or race.seeds))


def _present(settings: Settings) -> dict[str, ImageRace]:
    found = {
        name: race
        for name, race in RACES.items()
        if not missing_files(SETS[name], settings.data_root)  # type: ignore[index]
    }
    if not found:
        raise InputError("neither mnist nor cifar-10 is there; see 'ocnopt data list'")
    return found


@dataclass(frozen=True)
class _Part(Settings):
    """One race of several: its picture has a name of its own, but not its command."""

    whole: Settings | None = None

    @property
    def command(self) -> str:
        assert self.whole is not None
        return self.whole.command


def _part(settings: Settings, place: int) -> _Part:
    name = settings.name + ("" if place == 0 else "abcdefgh"[place])
    own = {"name": name, "whole": settings}
    return _Part(**{**vars(settings), **own})


def _lowered(page: str) -> str:
    """A page whose headings are a level lower."""
    return re.sub(r"^#", "##", page, flags=re.MULTILINE)
