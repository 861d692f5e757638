"""What a feedback policy answers to, as images.

Algorithm 4, Fig. 5 and 7 of Liu et al., ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ocnopt.control.policy import Policy
from ocnopt.errors import OptionError
from ocnopt.experiments.files import write_atomically

__all__ = ["feedback_direction", "save_feedback_images"]


def feedback_direction(policy: Policy) -> Tensor:
    """The state differential that every sample's feedback answers most: v_max of Algorithm 4.

    The leading right-singular vector of K_t, found from its factors: with ``left = Q_l R_l`` and
    ``right = Q_r R_r`` it is that of the small ``R_l core R_r^T``, carried back by Q_r. Its sign,
    which K leaves open, is the one in which the sample's cost rises: ``<v_max, V_x> >= 0``; where
    that product is zero, its largest entry is positive.

    Args:
        policy: One player's.

    Returns:
        Unit vectors in the player's input, (B, n); zero where K is zero.
    """
    gain = policy.K
    if gain.rest is not None:
        _, s, right = torch.linalg.svd(gain.materialize(), full_matrices=False)
        found = right[:, 0]
    else:
        _, r_left = torch.linalg.qr(gain.left)
        q_right, r_right = torch.linalg.qr(gain.right)
        _, s, small = torch.linalg.svd(r_left @ gain.core @ r_right.transpose(1, 2))
        found = (q_right @ small[:, 0].unsqueeze(-1)).squeeze(-1)
    slope = (found * policy.V_x.to(found.dtype)).sum(1)
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))[:, 0]
    sign = torch.where(slope == 0, largest, slope).sign() * (s[:, 0] > 0)
    direction: Tensor = found * sign.unsqueeze(1)
    return direction


def save_feedback_images(
    path: Path, title: str, labels: Sequence[str], inputs: Tensor, deltas: Mapping[str, Tensor]
) -> None:
    """Draw inputs beside the differential images that the policy answers (Fig. 5).

    Args:
        path: The PNG file.
        title: Heading.
        labels: What each row is called.
        inputs: x, (rows, channels, height, width) or without channels.
        deltas: By column heading, images shaped like the inputs. Each is drawn on a scale of its
            own, white at zero, red above, blue below.

    Raises:
        OptionError: Shapes that do not agree.
    """
    for name, images in deltas.items():
        if images.shape != inputs.shape or len(images) != len(labels):
            raise OptionError(
                f"column {name!r} has shape {tuple(images.shape)}, but the inputs have "
                f"{tuple(inputs.shape)} for {len(labels)} labels"
            )
    rows, columns = len(labels), 1 + len(deltas)
    figure = Figure(figsize=(1.25 * columns + 0.6, 1.2 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title)
    for line, label, x in zip(axes, labels, inputs, strict=True):
        line[0].imshow(_plane(x), cmap="gray")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    axes[0][0].set_title("input x", fontsize="small")
    for column, (name, images) in zip(axes.T[1:], deltas.items(), strict=True):
        column[0].set_title(name, fontsize="small")
        for ax, delta in zip(column, images, strict=True):
            _draw_delta(ax, _plane(delta))
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw_delta(ax: Axes, image: NDArray[Any]) -> None:
    size = float(abs(image).max()) or 1.0
    ax.imshow(image, cmap="RdBu_r", vmin=-size, vmax=size)


def _plane(image: Tensor) -> NDArray[Any]:
    """(height, width), the sum over channels where there are any."""
    image = image.detach().cpu()
    plane: NDArray[Any] = (image.sum(0) if image.dim() == 3 else image).numpy()
    return plane
