"""Train one network on one data set with one optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.errors import NonFiniteError, OcnoptError
from ocnopt.experiments import optimizers
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.runfolder import RunFolder
from ocnopt.experiments.setup import build_network, correct, load_data, total_steps
from ocnopt.experiments.stopwatch import Stopwatch

_EVALUATION_BATCH = 1000


class Watcher:
    """Told how a run goes; does nothing. A progress bar overrides what it wants to hear."""

    def start(self, step: int, total: int) -> None:
        """Called once, with the steps already done and the steps to be done in all."""

    def stepped(self, step: int, loss: Tensor) -> None:
        """Called after every step; reading the loss costs a wait for the device."""

    def logged(self, row: dict[str, Any]) -> None:
        """Called with every row of metrics."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        config: Its settings, with every default filled in.
        model: The trained network.
        parameters: Number of trainable numbers in it.
        steps: Steps done, from the first start of a resumed run on.
        steps_per_epoch: Steps in an epoch.
        train_loss: Mean training loss over the last epoch's steps (over all steps if there are
            fewer); NaN if the run diverged.
        test_accuracy: Share of test samples classified right at the end, in [0, 1].
        diverged_step: Step, counted from 1, whose loss, gradient or update was not finite; None
            if there was none. The run ends there.
        seconds: Training time, without evaluation and the writing of files.
        history: Training loss of every step, (steps,), float32, on the CPU.
        rows: The logged rows, as in metrics.jsonl.
        diagnostics: The optimizer's totals at the last logged step; None if it keeps none.
    """

    config: TrainConfig
    model: nn.Module
    parameters: int
    steps: int
    steps_per_epoch: int
    train_loss: float
    test_accuracy: float
    diverged_step: int | None
    seconds: float
    history: Tensor
    rows: list[dict[str, Any]]
    diagnostics: dict[str, Any] | None

    def summary(self) -> dict[str, Any]:
        """Return the result as plain values for JSON; may hold NaN."""
        return {
            **self.config.to_json(),
            "output": None if self.config.output is None else str(self.config.output),
            "parameters": self.parameters,
            "steps": self.steps,
            "epochs": self.steps / self.steps_per_epoch,
            "train_loss": self.train_loss,
            "test_accuracy": self.test_accuracy,
            "diverged": self.diverged_step is not None,
            "diverged_step": self.diverged_step,
            "seconds": self.seconds,
            "diagnostics": self.diagnostics,
        }


def train(config: TrainConfig, watcher: Watcher | None = None) -> TrainResult:
    """Train as a configuration says.

    The initial weights and the data order depend on the seed alone, so that runs of two
    optimizers under one seed start alike and see the same batches. The caller's random state and
    torch's thread setting are left as they were.

    Args:
        config: What to do.
        watcher: Told how the run goes.

    Returns:
        What came of it. Divergence is a result, not an error.

    Raises:
        InputError: If the configuration, the data or the output folder cannot be used.
    """
    config = config.resolved()
    device = _device(config.device)
    cuda = [device] if device.type == "cuda" else []
    forked = torch.random.fork_rng(devices=cuda)
    with threads(config.threads), forked:
        return _Run(config, device).finish(watcher or Watcher())


class _Run:
    """The state of a run between two steps."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        assert config.batch_size is not None and config.lr is not None  # resolved
        self.config = config
        self.device = device
        self.data = load_data(config).to(device)
        samples = len(self.data.train_y)
        torch.manual_seed(config.seed)
        self.model = build_network(config, self.data).to(device)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optimizers.build(
            config.optimizer, self.model, self.criterion, config.lr, config.options
        )
        self.order = DataOrder(samples, config.batch_size, config.seed, device)
        self.total = total_steps(config, self.order.steps_per_epoch)
        # Losses stay on the device until a row is logged: reading one waits for the device.
        self.history = torch.full((self.total,), float("nan"), device=device)
        self.step = 0
        self.logged = 0
        self.spent = Stopwatch()
        self.diverged: int | None = None
        self.rows: list[dict[str, Any]] = []
        self.folder = None if config.output is None else RunFolder(config.output)
        if self.folder is not None:
            state = self.folder.open(config)
            if state is not None:
                self._restore(state)
            self.folder.begin(config, self.step)
            self.rows = self.folder.rows()

    def finish(self, watcher: Watcher) -> TrainResult:
        watcher.start(self.step, self.total)
        if self.config.evaluate_every is not None and not self.rows:
            self._log(watcher)
        try:
            self._loop(watcher)
        except Exception:
            if self.folder is not None and self.step == 0 and not self.config.resume:
                self.folder.discard()
            raise
        if self.diverged is not None:
            self._log(watcher)
        if self.folder is not None:
            from ocnopt.experiments.figures import save_run  # matplotlib takes a second to import

            save_run(self.folder.figure, self._title(), self._losses(), self.rows)
        return self._result()

    def _loop(self, watcher: Watcher) -> None:
        x, y, per_epoch = self.data.train_x, self.data.train_y, self.order.steps_per_epoch
        model, criterion, optimizer = self.model, self.criterion, self.optimizer
        log_every, keep_every = self.config.log_every, self.config.checkpoint_every
        batchwise = optimizers.runs_batches(optimizer)
        step: Any = optimizer.step
        model.train()
        self.spent.start()
        while self.step < self.total:
            index = self.order.batch(self.step)
            try:
                if batchwise:  # the optimizer runs the batch itself
                    loss = step(x[index], y[index])
                    assert isinstance(loss, Tensor)
                    self.history[self.step] = loss.detach()
                else:
                    optimizer.zero_grad()
                    loss = criterion(model(x[index]), y[index])
                    self.history[self.step] = loss.detach()
                    loss.backward()
                    step()
            except NonFiniteError:
                self.diverged = self.step + 1
                self.spent.stop()
                return
            except OcnoptError as error:  # not for this network, say
                raise InputError(f"step {self.step + 1}: {error}") from error
            self.step += 1
            watcher.stepped(self.step, loss)

            ends = self.step % per_epoch == 0 or self.step == self.total
            due = self._due(ends)
            log = ends or due or self.step % log_every == 0
            keep = ends or (keep_every is not None and self.step % keep_every == 0)
            if log or keep:
                self._synchronize()
                self.spent.stop()
                if not self._finite():
                    return
                if log:
                    self._log(watcher, evaluate=due or self.config.curve)
                if keep and self.folder is not None:
                    self.folder.save(self._state())
                self.spent.start()

    def _due(self, ends: bool) -> bool:
        """Whether an evaluation comes now, at the end of an epoch or not."""
        if self.config.evaluate_every is None:
            return ends
        every = self.config.evaluate_every * self.order.steps_per_epoch
        # Ten times a tenth of an epoch is a whole one.
        before, now = (int(step / every + 1e-9) for step in (self.step - 1, self.step))
        return now > before or self.step == self.total

    def _finite(self) -> bool:
        """Look for a loss that is not finite since the last row, and note the first."""
        bad = (~torch.isfinite(self.history[self.logged : self.step])).nonzero()
        if len(bad):
            self.diverged = self.logged + int(bad[0]) + 1
        return not len(bad)

    def _log(self, watcher: Watcher, *, evaluate: bool = True) -> None:
        diagnostics = self._diagnostics()
        losses = self.history[self.logged : self.step]
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step / self.order.steps_per_epoch,
            "train_loss": float(losses.mean()) if len(losses) else None,
            "test_accuracy": self._accuracy() if evaluate else None,
            "seconds": self.spent.seconds,
            "cpu_seconds": self.spent.cpu_seconds,
        }
        if diagnostics is not None:
            row["diagnostics"] = diagnostics
        if self.diverged is not None:
            row.update(step=self.diverged, train_loss=None, diverged=True)
            row["epoch"] = self.diverged / self.order.steps_per_epoch
        self.logged = self.step
        self.rows.append(row)
        if self.folder is not None:
            self.folder.append(row)
        watcher.logged(row)

    def _diagnostics(self) -> dict[str, Any] | None:
        diagnostics = getattr(self.optimizer, "diagnostics", None)
        if diagnostics is None or self.step == 0:
            return None
        total: dict[str, Any] = diagnostics.as_dict()["total"]
        return total

    def _accuracy(self) -> float:
        """Share of test samples classified right; outputs that are not finite count as wrong."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        x, y = self.data.test_x, self.data.test_y
        with torch.no_grad():
            for start in range(0, len(y), _EVALUATION_BATCH):
                part = slice(start, start + _EVALUATION_BATCH)
                # A differential equation that overflows has no outputs at all.
                with contextlib.suppress(NonFiniteError):
                    right += correct(self.model(x[part]), y[part]).sum()
        self.model.train()
        return int(right) / len(y)

    def _losses(self) -> Tensor:
        """The losses of the steps that count, a diverged step's included."""
        return self.history[: self.diverged or self.step].cpu()

    def _state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "logged": self.logged,
            "seconds": self.spent.seconds,
            "cpu_seconds": self.spent.cpu_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": self.history[: self.step].clone(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.folder is not None
        if state["step"] > self.total:
            raise InputError(
                f"the run in {self.folder.path} has already done {state['step']} steps, more than"
                f" the {self.total} asked for; ask for more"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            self.history[: state["step"]] = state["history"]
            self.step, self.logged = state["step"], state["logged"]
            self.spent = Stopwatch(state["seconds"], state.get("cpu_seconds", float("nan")))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.folder.checkpoint} does not fit this run ({_first_line(error)}); start"
                " again in a new folder"
            ) from None

    def _result(self) -> TrainResult:
        history = self._losses()
        last_epoch = history[-self.order.steps_per_epoch :]
        diverged = self.diverged is not None
        last_row = self.rows[-1] if self.rows else {}
        accuracy = last_row.get("test_accuracy")
        return TrainResult(
            config=self.config,
            model=self.model,
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            steps=len(history),
            steps_per_epoch=self.order.steps_per_epoch,
            train_loss=float("nan") if diverged else float(last_epoch.mean()),
            test_accuracy=self._accuracy() if accuracy is None else accuracy,
            diverged_step=self.diverged,
            seconds=self.spent.seconds,
            history=history,
            rows=self.rows,
            diagnostics=last_row.get("diagnostics"),
        )

    def _title(self) -> str:
        c = self.config
        return f"{c.dataset}, {c.network}, {c.optimizer} at learning rate {c.lr:g}, seed {c.seed}"

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).item()  # a device that computes
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {name!r} cannot be used here ({_first_line(error)}); try --device cpu"
        ) from None
    return device


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use so many threads within the block; None for as many as before."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
