"""The spectrum of a batch's feedback policy (Liu et al., ICLR 2021, Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from ocnopt.control.policy import Policy
from ocnopt.errors import OptionError
from ocnopt.experiments.files import write_atomically

__all__ = ["Spectra", "count_above_bulk", "feedback_spectrum", "save_spectra"]


def feedback_spectrum(policy: Policy) -> Tensor:
    """Singular values of the batch's policy E[K], largest first.

    The paper draws "eigenvalues of the feedback policy", but a policy is m x n (parameters by
    states) and has none. What a step applies to a batch is the mean policy E[K] (Algorithm 3), and
    what its response to a differential can amplify are its singular values. The eigenvalues of
    ``E[K]^T E[K]`` are their squares: as many of them are zero, and the order is the same.

    Args:
        policy: One player's.

    Returns:
        (min(m, n),), float64.
    """
    values: Tensor = torch.linalg.svdvals(policy.K.mean().double())
    return values.cpu()


def count_above_bulk(values: Tensor, threshold: float = 1e-3) -> int:
    """How many values stand out.

    Args:
        values: Not negative, in any order.
        threshold: Share of the largest that a value must exceed.

    Returns:
        Their number; 0 where all are zero.
    """
    if not 0 <= threshold < 1:
        raise OptionError(f"threshold={threshold!r}, but it is a share of the largest, below 1")
    if not len(values):
        return 0
    return int((values > threshold * values.max()).sum())


@dataclass(frozen=True)
class Spectra:
    """One panel.

    Attributes:
        heading: Above it.
        curves: Spectra, largest value first, by iteration; the later the darker.
        marked: Number of values at which the dashed line stands.
        threshold: Share of a curve's largest value below which a value counts as none; drawn as a
            dotted line for the last curve.
    """

    heading: str
    curves: Mapping[str, Tensor]
    marked: int
    threshold: float = 1e-3


def save_spectra(path: Path, title: str, rows: Mapping[str, Sequence[Spectra]]) -> None:
    """Draw spectra on logarithmic axes: on linear ones, what is small looks like zero.

    Args:
        path: The PNG file.
        title: Heading.
        rows: Panels by what their row is called. All have the same curves.
    """
    columns = max(len(panels) for panels in rows.values())
    figure = Figure(figsize=(2.9 * columns + 1, 2.4 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.suptitle(title)
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        for ax in line[len(panels) :]:
            ax.set_axis_off()
        for ax, panel in zip(line, panels, strict=False):
            for number, (label, values) in enumerate(panel.curves.items()):
                colour = colormaps["viridis_r"]((number + 1) / len(panel.curves))
                shown = values.where(values > 0, torch.nan).numpy()
                ax.plot(range(1, len(values) + 1), shown, ".-", color=colour, lw=1, label=label)
            last = list(panel.curves.values())[-1]
            ax.axhline(panel.threshold * float(last.max()), color="#888888", ls=":", lw=0.8)
            ax.axvline(panel.marked, color="black", ls="--", lw=0.8)
            ax.set_title(panel.heading, fontsize="medium")
            ax.set_yscale("log")
            ax.grid(True, alpha=0.2)
        line[0].set_ylabel(f"{name}\nsingular values")
    for ax in axes[-1]:
        ax.set_xlabel("order")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title="iteration", loc="outside right upper")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
