"""The folder of one training run: its settings, metrics and checkpoint."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import without_non_finite, write_atomically, write_json

_CHECKPOINT_FORMAT = 1


class RunFolder:
    """The files of one run.

    Attributes:
        path: The folder.
        config: Its `config.json`, the settings with every default filled in.
        metrics: Its `metrics.jsonl`, one JSON object per logged step.
        checkpoint: Its `checkpoint.pt`, all that is needed to go on bit-exactly.
        figure: Its `run.png`.
    """

    def __init__(self, path: Path) -> None:
        """Name the files of a run; touches nothing."""
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.figure = path / "run.png"
        self._made = False

    def open(self, config: TrainConfig) -> dict[str, Any] | None:
        """Look at what is there; nothing is written yet.

        Args:
            config: The run's resolved settings.

        Returns:
            The checkpoint to go on from, or None to start at the beginning.

        Raises:
            InputError: If the folder holds a run that is not to be resumed, holds none or a
                different one that is.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError("an output folder needs matplotlib; pip install 'ocnopt[experiments]'")
        state = None
        if config.resume:
            differences = config.differences(self.read_config())
            if differences:
                raise InputError(
                    f"the run in {self.path} has {'; '.join(differences)}; resume it as it was or"
                    " choose a new folder"
                )
            # A run that was stopped before its first checkpoint starts over.
            state = self._read_checkpoint() if self.checkpoint.exists() else None
        elif any(file.exists() for file in (self.config, self.metrics, self.checkpoint)):
            raise InputError(
                f"{self.path} already holds a run; take it up with --resume or choose another"
                " folder"
            )
        return state

    def begin(self, config: TrainConfig, step: int) -> None:
        """Make the folder ready for a run to write to.

        Args:
            config: The run's resolved settings.
            step: Where it starts.

        Raises:
            InputError: The folder cannot be written to.
        """
        self._made = not self.path.exists()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.config, config.to_json())
            self._truncate_metrics(step)

    def discard(self) -> None:
        """Take back what :meth:`begin` made, of a run whose first step has failed."""
        with contextlib.suppress(OSError):
            for file in (self.config, self.metrics):
                file.unlink(missing_ok=True)
            if self._made:
                self.path.rmdir()

    def read_config(self) -> dict[str, Any]:
        """Read the settings of the run in this folder.

        Raises:
            InputError: If there is no run, or its settings are damaged.
        """
        try:
            kept = json.loads(self.config.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path} holds no run to resume; leave out --resume") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.config} cannot be read: {error}") from None
        if not isinstance(kept, dict):
            raise InputError(f"{self.config} holds no settings; start again in a new folder")
        return kept

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row to the metrics; a reader sees it at once.

        Raises:
            InputError: The folder cannot be written to any more.
        """
        with self._writing(), self.metrics.open("a") as file:
            file.write(json.dumps(without_non_finite(row)) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Read the metrics, up to a line that is damaged, as a crash may have cut the last."""
        rows: list[dict[str, Any]] = []
        if self.metrics.exists():
            for line in self.metrics.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    break
                rows.append(row)
        return rows

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint, atomically. `torch.load(..., weights_only=True)` reads it.

        Raises:
            InputError: The folder cannot be written to any more.
        """
        whole = {"format": _CHECKPOINT_FORMAT, **state}
        with self._writing():
            write_atomically(self.checkpoint, lambda file: torch.save(whole, file))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}") from None

    def _read_checkpoint(self) -> dict[str, Any]:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can end in almost any
            raise InputError(
                f"{self.checkpoint} cannot be read ({type(error).__name__}); if it is damaged,"
                " remove it to start this run over"
            ) from None
        if not isinstance(state, dict) or state.get("format") != _CHECKPOINT_FORMAT:
            raise InputError(
                f"{self.checkpoint} was written by another version; start again in a new folder"
            )
        return state

    def _truncate_metrics(self, step: int) -> None:
        # Rows after the checkpoint are computed again; keeping them would show those steps twice.
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        write_atomically(self.metrics, lambda file: file.write("".join(kept).encode()))
