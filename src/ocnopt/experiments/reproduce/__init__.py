"""Figures of the papers, made anew: what each says, and what is seen here.

Importing this package costs nothing: an experiment's module is imported when it is run.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPERIMENTS", "IMAGES", "Experiment"]


class Experiment(NamedTuple):
    """Where an experiment is.

    Attributes:
        module: Its module.
        function: Called with :class:`~ocnopt.experiments.reproduce.report.Settings` and
            :class:`~ocnopt.experiments.reproduce.report.Watcher`; returns a
            :class:`~ocnopt.experiments.reproduce.report.Report`.
        shows: What it shows, in a few words.
    """

    module: str
    function: str
    shows: str


_HERE = "ocnopt.experiments.reproduce"
#: Image data sets by name, as pages call them.
IMAGES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar-10": "CIFAR-10"}

EXPERIMENTS: dict[str, Experiment] = {
    "figure3": Experiment(f"{_HERE}.figure3", "run", "time and memory of a step over batch sizes"),
    "figure4": Experiment(
        f"{_HERE}.feedback_grid", "figure4", "with and without feedback over a grid (DIGITS)"
    ),
    "figure5": Experiment(
        f"{_HERE}.figure5", "run", "what feedback policies answer to, as images (MNIST files)"
    ),
    "figure6": Experiment(
        f"{_HERE}.vanishing", "run", "who leaves the plateau of nine sigmoid layers"
    ),
    "figure8": Experiment(
        f"{_HERE}.figure8", "run", "the spectrum of a batch's policy on Gaussian clusters"
    ),
    "figure9": Experiment(f"{_HERE}.feedback_grid", "figure9", "as figure4, for Adam"),
    "figure10": Experiment(
        f"{_HERE}.vanishing", "run", "as figure6, with cross-entropy, with ReLU"
    ),
    "figure11": Experiment(f"{_HERE}.vanishing", "run", "as figure6, adaptive diagonals"),
    "figure12": Experiment(f"{_HERE}.vanishing", "run", "as figure6, over learning rates"),
    "table3": Experiment(
        f"{_HERE}.table3", "run", "test accuracy of seven methods on the data sets at hand"
    ),
    "tables6-8": Experiment(
        f"{_HERE}.feedback_grid", "tables6_8", "feedback at every baseline's best learning rate"
    ),
    "table9": Experiment(f"{_HERE}.feedback_grid", "table9", "training losses of figure4's grid"),
    "table10": Experiment(f"{_HERE}.feedback_grid", "table10", "accuracies of figure4's grid"),
    "residual": Experiment(
        f"{_HERE}.dgnopt_grid", "study", "layers as players: a residual network (DIGITS)"
    ),
    "inception": Experiment(
        f"{_HERE}.dgnopt_grid", "study", "layers as players: a branching network (DIGITS)"
    ),
    **{
        f"{kind}-{name}": Experiment(f"{_HERE}.dgnopt_grid", "study", f"as {kind}, on {shown}")
        for kind in ("residual", "inception")
        for name, shown in IMAGES.items()
    },
    "ode-series": Experiment(
        f"{_HERE}.ode_series", "words", "SNOpt against the clock: a GRU-ODE on articulated words"
    ),
    "ode-characters": Experiment(
        f"{_HERE}.ode_series", "characters", "as ode-series, on handwritten characters"
    ),
    "ode-image": Experiment(
        f"{_HERE}.ode_image", "race", "SNOpt against the clock: a Neural ODE on CIFAR-10"
    ),
    "ode-mnist": Experiment(f"{_HERE}.ode_image", "race", "as ode-image, on MNIST"),
    "ode-released": Experiment(
        f"{_HERE}.ode_image", "race", "as ode-mnist, at the paper's settings, untuned"
    ),
    "ode-whole": Experiment(
        f"{_HERE}.ode_image", "race", "OCNOpt beside SNOpt: feedback about a Neural ODE on MNIST"
    ),
    "ode-flow": Experiment(
        f"{_HERE}.ode_flow", "run", "SNOpt against the clock: continuous flows in the plane"
    ),
    "ode-time": Experiment(
        f"{_HERE}.ode_time", "run", "the integration time of a Neural ODE, trained as well"
    ),
}
