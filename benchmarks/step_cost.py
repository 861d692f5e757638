"""Time per step and peak memory of every optimizer, relative to torch.optim.SGD.

    python benchmarks/step_cost.py [--threads 1,2] [--nets fcn,cnn] [--page docs/results/cost.md]

All optimizers take turns in one run, one step each per round, and the median is reported: what the
machine does meanwhile hits all of them alike. Memory is what the model and the optimizer hold
between steps, and the peak of what a step allocates, counted operation by operation.

The floor: a step of SGD is three products per layer (forward, input gradients, weight gradients).
The linear rollout adds one (the update applied to the recorded inputs) and a weight gradient of
its own, as ``.grad`` stays what the loop expects: 5/3. With keep_grad=False autograd forms no
weight gradient: 4/3. The share recursion needs the norm of every
sample's gradient: nothing to speak of for M = I on linear layers, a product with per-sample
gradients where there are locations, one more product per layer where M is diagonal.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import ocnopt
from ocnopt.experiments.peak_memory import PeakMemory

Net = tuple[nn.Module, Tensor, Tensor]


def fcn() -> Net:
    """Five layers of DIGITS size, batch 8: nothing but overhead."""
    widths = [64, 32, 32, 32, 16]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(16, 10))
    return model, torch.randn(8, 64), torch.randint(10, (8,))


def cnn() -> Net:
    """Four 3x3 convolutions with 32 channels on MNIST images, batch 128."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 32), (32, 32), (32, 32), (32, 32)]):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        if i % 2:
            layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return model, torch.randn(128, 1, 28, 28), torch.randint(10, (128,))


def mlp() -> Net:
    """Six layers of width 1024, batch 256: nothing but products."""
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(1024, 1024))
    return model, torch.randn(256, 1024), torch.randint(10, (256,))


class Transformer(nn.Module):
    """Two encoder layers on characters."""

    def __init__(self, vocabulary: int = 64, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, vocabulary, time)."""
        return self.head(self.encoder(self.embedding(x))).transpose(1, 2)


def transformer() -> Net:
    """Batch 32 of 64 characters."""
    return Transformer(), torch.randint(64, (32, 64)), torch.randint(64, (32, 64))


NETS: dict[str, Callable[[], Net]] = {
    "fcn": fcn,
    "cnn": cnn,
    "mlp": mlp,
    "transformer": transformer,
}

_CRITERIA: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def own(model: nn.Module) -> nn.Module:
    """A model's own criterion: where one is shared, every optimizer hears of all calls of it."""
    return _CRITERIA.setdefault(model, nn.CrossEntropyLoss())


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-4),
    "KFAC": lambda m: ocnopt.KFAC(m, own(m), lr=1e-4),
    "EKFAC": lambda m: ocnopt.EKFAC(m, own(m), lr=1e-4),
    "DDPNOpt": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-3),
    "DDPNOpt, no recursion": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-3, bellman="off"),
    "DDPNOpt, keep_grad=False": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-3, keep_grad=False),
    "DDPNOpt, both off": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-3, bellman="off", rollout="off"),
    "DDPNOpt rmsprop": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-4, preconditioner="rmsprop"),
    "DDPNOpt rmsprop, no recursion": lambda m: ocnopt.DDPNOpt(
        m, own(m), lr=1e-4, preconditioner="rmsprop", bellman="off"
    ),
    "DDPNOpt rmsprop, no recursion, keep_grad=False": lambda m: ocnopt.DDPNOpt(
        m, own(m), lr=1e-4, preconditioner="rmsprop", bellman="off", keep_grad=False
    ),
    "DDPNOpt adam": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-4, preconditioner="adam"),
    "DDPNOpt kfac": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-4, preconditioner="kfac"),
    "DDPNOpt ekfac": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-4, preconditioner="ekfac"),
    "DDPNOpt nonlinear": lambda m: ocnopt.DDPNOpt(m, own(m), lr=1e-3, rollout="nonlinear"),
}
#: The net whose arithmetic is next to nothing.
SMALL = "fcn"
#: Steps between two refreshes of the curvature, the default.
CYCLE = 10
#: Products of a step of SGD, per layer: forward, gradients of inputs and of weights.
PRODUCTS = 3
#: Products per layer that an optimizer adds to its lender's step; without .grad autograd forms one
#: less.
ADDED = {
    "DDPNOpt": ("SGD", 2),
    "DDPNOpt, keep_grad=False": ("SGD", 1),
    "DDPNOpt rmsprop": ("RMSprop", 3),
    "DDPNOpt rmsprop, no recursion": ("RMSprop", 2),
    "DDPNOpt adam": ("Adam", 3),
    "DDPNOpt ekfac": ("EKFAC", 2),
}


class Run:
    """One optimizer on its own copy of a net."""

    def __init__(
        self,
        net: Callable[[], Net],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        model, x, y = net()
        self.model, self.x, self.y = model.to(device), x.to(device), y.to(device)
        self.optimizer = optimizer(self.model)
        self.device = device
        self.times: list[float] = []

    def step(self) -> None:
        """One step of the ordinary loop."""
        self.optimizer.zero_grad()
        own(self.model)(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def timed(self) -> None:
        """One step, on the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)

    def memory(self) -> int:
        """Peak bytes of one step: what is held between steps, and all that the step allocates."""
        self.optimizer.zero_grad()
        held = held_bytes([self.model, self.optimizer])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() - before + held
        with PeakMemory() as live:
            self.step()
        return live.peak + held


def seconds_over_cycles(runs: dict[str, Run], cycles: int) -> dict[str, float]:
    """Mean seconds of a step, one that refreshes the curvature in every ten, taken in turns.

    That one costs more than the others: the median is taken for each place in a cycle apart.

    Args:
        runs: By optimizer; none has taken a step.
        cycles: How many are timed, after one that is not.
    """
    for run in runs.values():
        for _ in range(CYCLE):
            run.step()
    for _ in range(cycles * CYCLE):
        for run in runs.values():
            run.timed()
    return {
        name: statistics.fmean(statistics.median(run.times[i::CYCLE]) for i in range(CYCLE))
        for name, run in runs.items()
    }


def held_bytes(roots: list[object]) -> int:
    """Bytes of all tensors that can be reached from some objects, shared ones counted once."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    rest = list(roots)
    while rest:
        found = rest.pop()
        if id(found) in seen or isinstance(found, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        rest.extend(gc.get_referents(found))
    return sum(storages.values())


def measure(net: str, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak bytes per optimizer."""
    runs = {name: Run(NETS[net], make, device) for name, make in OPTIMIZERS.items()}
    for run in runs.values():
        for _ in range(3):
            run.step()
    for _ in range(rounds):
        for run in runs.values():
            run.timed()
    return {
        name: {"seconds": statistics.median(run.times), "bytes": float(run.memory())}
        for name, run in runs.items()
    }


def relative(nets: dict[str, dict[str, dict[str, float]]], base: str) -> list[str]:
    """A table of time and memory per net and optimizer, as multiples of one optimizer's."""
    lines = [
        f"| optimizer | {' | '.join(f'{net} time | memory' for net in nets)} |",
        f"|---|{'---|---|' * len(nets)}",
    ]
    for name in next(iter(nets.values())):
        cells = []
        for table in nets.values():
            row, unit = table[name], table[base]
            cells.append(f"{row['seconds'] / unit['seconds']:.2f}")
            cells.append(f"{row['bytes'] / unit['bytes']:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    itself = ", ".join(
        f"{net} {table[base]['seconds'] * 1e3:.2f} ms, {table[base]['bytes'] / 2**20:.1f} MiB"
        for net, table in nets.items()
    )
    return [*lines, "", f"{base} itself: {itself}."]


def beside_floor(nets: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Time as a multiple of the lender's, and the floor: the lender's step and the products."""
    lines = [f"| optimizer | lender | {' | '.join(nets)} |", f"|---|---|{'---|' * len(nets)}"]
    for name, (lender, products) in ADDED.items():
        cells = []
        for table in nets.values():
            unit = table[lender]["seconds"]
            product = table["SGD"]["seconds"] / PRODUCTS
            floor = (unit + products * product) / unit
            cells.append(f"{table[name]['seconds'] / unit:.2f} ({floor:.2f})")
        lines.append(f"| {name} | {lender} | {' | '.join(cells)} |")
    return lines


def page(figures: dict[str, dict[str, dict[str, dict[str, float]]]], device: str) -> str:
    """The tables as Markdown."""
    lines = [
        "# What a step costs",
        "",
        f"Written by `python benchmarks/step_cost.py` ({device}, torch {torch.__version__}).",
        "Time and peak memory of one step relative to `torch.optim.SGD`, measured in turns in one",
        "run, medians.",
        "",
        "The floor. A step of SGD is three products per layer: forward, gradients of the inputs",
        "and of the weights. The linear rollout adds two, the update applied to recorded inputs",
        "and a weight gradient with feedback, as `.grad` stays what the loop expects: 1.67 times",
        "SGD. With `keep_grad=False` autograd forms no weight gradient: 1.33. Beside an optimizer",
        "that takes c times SGD's time it is (c + 2/3) / c.",
        "",
        "Where the rest goes. An adaptive M is built from the gradient, which without `.grad` has",
        "to be formed (floor 1.67 there, too); with the share recursion it needs each sample's",
        "gradient norm under M: one more product (2.00). Convolutions form per-sample gradients",
        "once, faster than the batch's own weight gradient, and answer everything else from them:",
        "hence less than the floor; attention and norms, which nothing is added to, have the same",
        "effect in the Transformer. Under KFAC and EKFAC the share recursion measures",
        "every sample's gradient in the metric: cheap at one location per sample, several",
        "products where there are many (Transformer). EKFAC on wide layers rotates whole",
        "gradients, there and back, which costs more than the batch; what feedback adds is rotated",
        "by its factors.",
        "The small network pays for the number of operations, whose arithmetic is next to nothing.",
    ]
    for threads, nets in figures.items():
        lines += ["", f"## {threads} thread{'s' if threads != '1' else ''}", ""]
        lines += relative(nets, "SGD")
        lines += ["", "Times the lender's step, and the floor in brackets:", ""]
        lines += beside_floor({net: table for net, table in nets.items() if net != SMALL})
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="thread counts, one table each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--page", type=Path, help="write the tables here, figures beside it")
    asked = parser.parse_args()
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for threads in asked.threads.split(","):
        torch.set_num_threads(int(threads))
        figures[threads] = {}
        for net in asked.nets.split(","):
            rounds = asked.rounds * (5 if net == SMALL else 1)
            figures[threads][net] = measure(net, torch.device(asked.device), rounds)
    text = page(figures, asked.device)
    print(text)
    if asked.page:
        asked.page.write_text(text)
        asked.page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
