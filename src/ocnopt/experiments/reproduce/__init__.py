"""Figures of the papers, made anew: what each says, and what is seen here.

Importing this package costs nothing: an experiment's module is imported when it is run.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPERIMENTS", "Experiment"]


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

EXPERIMENTS: dict[str, Experiment] = {
    "figure5": Experiment(
        f"{_HERE}.figure5", "run", "what feedback policies answer to, as images (MNIST files)"
    ),
    "figure6": Experiment(
        f"{_HERE}.vanishing", "run", "who leaves the plateau of nine sigmoid layers"
    ),
    "figure8": Experiment(
        f"{_HERE}.figure8", "run", "the spectrum of a batch's policy on Gaussian clusters"
    ),
    "figure10": Experiment(
        f"{_HERE}.vanishing", "run", "as figure6, with cross-entropy, with ReLU"
    ),
    "figure11": Experiment(f"{_HERE}.vanishing", "run", "as figure6, adaptive diagonals"),
    "figure12": Experiment(f"{_HERE}.vanishing", "run", "as figure6, over learning rates"),
}
