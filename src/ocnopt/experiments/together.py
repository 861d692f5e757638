"""Train the same network from several seeds at once, as stacked layers.

Ten small networks, one after another, spend their time on Python; stacked they take little longer
than one. Every seed has the initial weights and the batches that it has alone, and its numbers
agree with those of :func:`~ocnopt.experiments.training.train` up to rounding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocnopt.errors import NonFiniteError
from ocnopt.experiments import optimizers
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.outcome import Outcome, make_outcome
from ocnopt.experiments.problems import OF_LINEAR_LAYERS
from ocnopt.experiments.setup import build_network, correct, load_data, total_steps
from ocnopt.experiments.training import threads
from ocnopt.layers import StackedLinear

__all__ = ["can_be_together", "stack", "train_together"]

#: Optimizers whose step on stacked layers is the step of every network alone.
_STACKABLE = frozenset({"ddpnopt", "dgnopt", "kfac", "ekfac", "sgd", "rmsprop", "adam"})
#: Alignments that do not answer to the loss, which is that of all seeds.
_ALIGNMENTS = ("auto", "early", "late", "random")
#: Rows that are evaluated at once.
_EVALUATION_ROWS = 10_000


def can_be_together(config: TrainConfig) -> bool:
    """Whether seeds of this run can be trained at once."""
    options = config.options
    alignment = options.get("alignment", "auto")
    return (
        config.network in OF_LINEAR_LAYERS
        and config.optimizer in _STACKABLE
        and config.device == "cpu"
        and config.evaluate_every is None
        and not options.get("measure_every")
        and options.get("dynamics_order", 1) == 1
        and (isinstance(alignment, int) or alignment in _ALIGNMENTS)
    )


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """Stack networks whose parameters all belong to linear layers.

    Args:
        networks: Modules of the same make.

    Returns:
        A copy of the first with :class:`~ocnopt.layers.StackedLinear` in place of every
        `nn.Linear`, and copies of the weights of all.

    Raises:
        ValueError: A parameter or buffer belongs to something else.
    """
    model = _with_stacked_layers(copy.deepcopy(networks[0]), len(networks))
    values, _ = torch.func.stack_module_state(list(networks))
    for name, kept in (*model.named_parameters(), *model.named_buffers()):
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), StackedLinear):
            raise ValueError(f"{name} belongs to no linear layer, and cannot be stacked")
        kept.data.copy_(values[name])
    return model


def _with_stacked_layers(module: nn.Module, networks: int) -> nn.Module:
    if isinstance(module, nn.Linear):
        stacked = StackedLinear(
            networks, module.in_features, module.out_features, module.bias is not None
        )
        return stacked.to(module.weight)
    for name, child in list(module.named_children()):
        setattr(module, name, _with_stacked_layers(child, networks))
    return module


def train_together(
    config: TrainConfig, seeds: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[Outcome]:
    """Train one configuration from several seeds.

    A seed that diverges is noted, and goes on as a copy of one that does not: the others go on as
    if it were not there.

    Args:
        config: What to do; its own seed does not count.
        seeds: One or more.
        dtype: Of weights and data.

    Returns:
        One outcome per seed. Their time per step is the shared step's, divided among them.

    Raises:
        InputError: If the configuration or the data cannot be used.
    """
    config = replace(config.resolved(), output=None, resume=False)
    with threads(config.threads), torch.random.fork_rng(devices=[]):
        return _Together(config, seeds, dtype).run()


class _Together:
    def __init__(self, config: TrainConfig, seeds: Sequence[int], dtype: torch.dtype) -> None:
        assert config.batch_size is not None and config.lr is not None  # resolved
        self.config = config
        self.seeds = seeds
        data = load_data(config)
        self.data = replace(data, train_x=data.train_x.to(dtype), test_x=data.test_x.to(dtype))
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(build_network(config, data).to(dtype))
        self.model = stack(networks)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optimizers.build(
            config.optimizer, self.model, self.criterion, config.lr, config.options
        )
        samples, device = len(data.train_y), torch.device("cpu")
        self.orders = [DataOrder(samples, config.batch_size, seed, device) for seed in seeds]
        self.per_epoch = self.orders[0].steps_per_epoch
        self.total = total_steps(config, self.per_epoch)
        self.history = torch.full((self.total, len(seeds)), float("nan"), dtype=dtype)
        self.live = list(range(len(seeds)))
        self.diverged: dict[int, int] = {}
        self.accuracy_at_end: dict[int, float] = {}
        self.curve: list[tuple[int, list[float]]] = []

    def run(self) -> list[Outcome]:
        self.model.train()
        seconds, step = 0.0, 0
        started = time.perf_counter()
        while step < self.total and self.live:
            self._step(step)
            step += 1
            ends = step % self.per_epoch == 0 or step == self.total
            if ends or step % self.config.log_every == 0:
                seconds += time.perf_counter() - started
                self._look_for_failures(step)
                if ends or self.config.curve:
                    self.curve.append((step, self._accuracies()))
                started = time.perf_counter()
        seconds += time.perf_counter() - started
        per_step = seconds / max(step, 1) / len(self.seeds)
        final = self.curve[-1][1] if self.curve else self._accuracies()
        return [self._outcome(i, final[i], per_step) for i in range(len(self.seeds))]

    def _step(self, step: int) -> None:
        """Take a step, without the seeds that fail in it."""
        while self.live:
            losses, error = self._attempt(step)
            self.history[step, self.live] = losses[self.live]
            if error is None:
                return
            self._end(dict.fromkeys(self._failed(losses) or self._failing(step, error), step + 1))

    def _attempt(self, step: int) -> tuple[Tensor, NonFiniteError | None]:
        """Every network's loss, and why no step was taken."""
        index = torch.cat([order.batch(step) for order in self.orders])
        x, y = self.data.train_x[index], self.data.train_y[index]
        networks = len(self.seeds)
        self.optimizer.zero_grad()
        outputs = self.model(x)
        losses = F.cross_entropy(outputs.detach(), y, reduction="none")
        losses = losses.unflatten(0, (networks, -1)).mean(1)
        try:
            # The sum of every network's mean loss.
            (self.criterion(outputs, y) * networks).backward()
            self.optimizer.step()
        except NonFiniteError as error:
            return losses, error
        return losses, None

    def _failed(self, losses: Tensor) -> list[int]:
        """The seeds whose loss or gradient is no number."""
        bad = ~torch.isfinite(losses)
        for p in self.model.parameters():
            if p.grad is not None:
                bad |= ~torch.isfinite(p.grad).flatten(1).all(1)
        return [i for i in self.live if bad[i]]

    def _failing(self, step: int, error: NonFiniteError) -> list[int]:
        """The seeds in which the optimizer overflows: those that fail without the others, too."""
        weights = [p.detach().clone() for p in self.model.parameters()]
        state = {p: dict(kept) for p, kept in self.optimizer.state.items()}
        orders = self.orders
        failing = []
        for i in self.live:
            self._copy(i, range(len(self.seeds)))
            if self._attempt(step)[1] is not None:
                failing.append(i)
            with torch.no_grad():
                for p, kept in zip(self.model.parameters(), weights, strict=True):
                    p.copy_(kept)
            self.optimizer.state.clear()
            self.optimizer.state.update({p: dict(kept) for p, kept in state.items()})
            self.orders = orders
        if not failing:
            raise error
        return failing

    def _look_for_failures(self, step: int) -> None:
        """Note losses that are no number, which torch's own optimizers do not refuse."""
        bad = ~torch.isfinite(self.history[:step])
        self._end({i: int(bad[:, i].nonzero()[0]) + 1 for i in self.live if bad[:, i].any()})

    def _end(self, steps: Mapping[int, int]) -> None:
        """End seeds, each at the step that came to no number."""
        if not steps:
            return
        accuracies = self._accuracies()
        for i, step in steps.items():
            self.diverged[i], self.accuracy_at_end[i] = step, accuracies[i]
        self.live = [i for i in self.live if i not in self.diverged]
        if self.live:
            self._copy(self.live[0], list(self.diverged))

    @torch.no_grad()
    def _copy(self, source: int, targets: Sequence[int]) -> None:
        """Let networks do what another does: its weights, the optimizer's state, its batches."""
        self.orders = list(self.orders)
        for i in targets:
            self.orders[i] = self.orders[source]
        index = list(targets)
        for p in self.model.parameters():
            p[index] = p[source].clone()
            state = self.optimizer.state.get(p, {})
            for name, kept in state.items():
                # Everything that belongs to stacked weights is stacked like them.
                if isinstance(kept, Tensor) and kept.dim() and len(kept) == len(self.seeds):
                    state[name] = kept.clone()
                    state[name][index] = kept[source]

    @torch.no_grad()
    def _accuracies(self) -> list[float]:
        """Share of test samples that every network classifies right."""
        x, y, networks = self.data.test_x, self.data.test_y, len(self.seeds)
        self.model.eval()
        right = torch.zeros(networks, dtype=torch.int64)
        chunk = max(1, _EVALUATION_ROWS // networks)
        for start in range(0, len(y), chunk):
            part = x[start : start + chunk]
            everyone = part.expand(networks, *part.shape).flatten(0, 1)
            outputs = self.model(everyone).unflatten(0, (networks, -1))
            right += correct(outputs, y[start : start + chunk]).sum(1)
        self.model.train()
        return [int(r) / len(y) for r in right]

    def _outcome(self, i: int, accuracy: float, seconds: float) -> Outcome:
        end = self.diverged.get(i)
        return make_outcome(
            seed=self.seeds[i],
            history=self.history[: end or self.total, i],
            per_epoch=self.per_epoch,
            diverged_step=end,
            accuracy=self.accuracy_at_end.get(i, accuracy),
            seconds_per_step=seconds,
            accuracies=[(step, row[i]) for step, row in self.curve if end is None or step < end],
            curve=self.config.curve,
        )
