"""Time per step and peak memory of DGNOpt, relative to EKFAC on the same network.

    python benchmarks/game_cost.py [--nets residual,inception] [--page docs/results/game-cost.md]

ResNet-18 takes ten minutes by itself, and is measured with few optimizers.

All optimizers take turns in one run, one step each per round, refreshes of the curvature included.
Memory is the peak of live tensor storage, in a step that refreshes and in one that does not.

The networks "1 branch" to "8 branches" have one block of so many 3x3 convolutions side by side,
with the same number of channels altogether: how the cost grows with the players of a stage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from step_cost import Net, Run, own, relative, seconds_over_cycles
from torch import Tensor, nn

import ocnopt
from ocnopt.experiments.networks import (
    Inception,
    ResidualCNN,
    ResidualFCN,
    inception,
    residual_cnn,
    residual_fcn,
)

#: The optimizer that the page is about.
WHOLE = "DGNOpt ekfac, group-rational"
#: What the networks below that take long are measured with.
FEW = ("SGD", "EKFAC", "DGNOpt ekfac, feedback", WHOLE)
SLOW = ("resnet-18",)
#: Channels of all branches together.
CHANNELS = 32


def _images(build: Callable[..., nn.Module], recipe: object, side: int, batch: int) -> Net:
    shape = (3, side, side)
    return build(recipe, shape, 10), torch.randn(batch, *shape), torch.randint(10, (batch,))


class Branches(nn.Module):
    """A stem, 3x3 convolutions side by side, and a head."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS // count, 3, padding=1) for _ in range(count)
        )
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        x = torch.relu(self.stem(x))
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return self.head(torch.relu(x).mean((2, 3)))


def _branches(count: int) -> Net:
    return Branches(count), torch.randn(32, 3, 16, 16), torch.randint(10, (32,))


RESNET_18 = ResidualCNN((64, 64, 128, 128, 256, 256, 512, 512), norm="batch")

NETS: dict[str, Callable[[], Net]] = {
    "digits-residual": lambda: (
        residual_fcn(ResidualFCN(), (64,), 10),
        torch.randn(8, 64),
        torch.randint(10, (8,)),
    ),
    "residual": partial(_images, residual_cnn, ResidualCNN((16, 32, 64)), 32, 32),
    "inception": partial(_images, inception, Inception((16, 32, 64)), 32, 32),
    "resnet-18": partial(_images, residual_cnn, RESNET_18, 32, 32),
    **{f"{n} branch{'es' if n > 1 else ''}": partial(_branches, n) for n in (1, 2, 4, 8)},
}


def _dgnopt(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return ocnopt.DGNOpt(model, own(model), lr=1e-4, **options)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
    "KFAC": lambda m: ocnopt.KFAC(m, own(m), lr=1e-4),
    "EKFAC": lambda m: ocnopt.EKFAC(m, own(m), lr=1e-4),
    **{
        f"DGNOpt {kind}, {information}": partial(
            _dgnopt, preconditioner=kind, information=information
        )
        for kind in ("kfac", "ekfac")
        for information in ("feedback", "group-rational")
    },
    "DGNOpt ekfac, group-rational, no recursion": partial(
        _dgnopt, preconditioner="ekfac", information="group-rational", bellman="off"
    ),
    "DGNOpt ekfac, group-rational, keep_grad=False": partial(
        _dgnopt, preconditioner="ekfac", information="group-rational", keep_grad=False
    ),
}


def measure(net: str, cycles: int) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of a step per optimizer."""
    device = torch.device("cpu")
    names = FEW if net in SLOW else OPTIMIZERS
    runs = {name: Run(NETS[net], OPTIMIZERS[name], device) for name in names}
    seconds = seconds_over_cycles(runs, 1 if net in SLOW else cycles)
    found = {}
    for name, run in runs.items():
        refreshing, after = run.memory(), run.memory()
        found[name] = {
            "seconds": seconds[name],
            "bytes": float(max(refreshing, after)),
            "bytes_after": float(after),
        }
    return found


def page(figures: dict[str, dict[str, dict[str, float]]], threads: int) -> str:
    """The table as Markdown."""
    floors = [
        f"{net} {1 + 2 / 3 * table['SGD']['seconds'] / table['EKFAC']['seconds']:.2f}"
        for net, table in figures.items()
    ]
    later = [
        f"{net} {table[WHOLE]['bytes_after'] / table['EKFAC']['bytes_after']:.2f}"
        for net, table in figures.items()
    ]
    tables = []
    for slow in (False, True):
        alike = {net: table for net, table in figures.items() if (net in SLOW) is slow}
        tables += [*relative(alike, "EKFAC"), ""] if alike else []
    lines = [
        "# What a step of DGNOpt costs",
        "",
        f"Written by `python benchmarks/game_cost.py` ({threads} thread"
        f"{'s' if threads > 1 else ''}, torch {torch.__version__}). Time per step and peak",
        "memory relative to EKFAC on the same network, refreshes of the curvature included; the",
        "optimizers took turns in one run.",
        "",
        *tables,
        "Feedback adds two products per layer, the update applied to recorded inputs and a weight",
        "gradient, to EKFAC's step; one of SGD has three. That floor, of feedback alone, without",
        f"value function or joint solve: {', '.join(floors)}. Convolutions go below it, as they",
        "answer both from per-sample gradients; the network on DIGITS pays for the number of",
        "operations instead.",
        "",
        "The peak of memory is in the one step of ten that refreshes the factors. In the others,",
        f"{WHOLE} takes beside EKFAC: {', '.join(later)}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--page", type=Path, help="write the table here, figures beside it")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    figures = {net: measure(net, asked.cycles) for net in asked.nets.split(",")}
    text = page(figures, asked.threads)
    print(text)
    if asked.page:
        asked.page.write_text(text)
        asked.page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
