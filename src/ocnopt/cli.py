"""The command line. Nothing heavy is imported before a command runs, so that help is instant."""

from __future__ import annotations

import importlib.util
import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocnopt.experiments.problems import Activation, DatasetName, NetworkName, OptimizerName

if TYPE_CHECKING:
    from cyclopts import App

    from ocnopt.experiments.config import TrainConfig
    from ocnopt.experiments.reproduce.report import Settings

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after the program's name; None takes those of this process.

    Returns:
        The exit code: 0, 2 on bad input (with one line on stderr), 130 when interrupted.
    """
    for module in ("cyclopts", "rich"):
        if importlib.util.find_spec(module) is None:
            return _fail(f"the command line needs {module}; pip install 'ocnopt[experiments]'")
    from cyclopts import CycloptsError

    from ocnopt.experiments.errors import InputError

    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _app()(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        command = f"ocnopt {words[0]}" if words[:1] in (["train"], ["reproduce"]) else "ocnopt"
        return _fail(f"{error} See {command} --help.")
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        if words[:1] == ["reproduce"]:
            _fail("interrupted; no page was written")
        else:
            _fail("interrupted; a run with --output goes on from its last checkpoint with --resume")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has left
        return 1
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"ocnopt: {' '.join(message.split())}\n")
    return BAD_INPUT


def _app() -> App:
    from cyclopts import App, Parameter

    from ocnopt import __version__

    app = App(
        name="ocnopt",
        help="Optimal-control optimizers for PyTorch.",
        version=__version__,
        default_parameter=Parameter(negative=(), show_default=False),
        suppress_keyboard_interrupt=False,
    )
    app.command(train)
    app.command(reproduce, help=_reproduce_help())
    return app


def _reproduce_help() -> str:
    from ocnopt.experiments.reproduce import EXPERIMENTS

    names = "\n".join(f"- {name}: {entry.shows}" for name, entry in EXPERIMENTS.items())
    return f"Make a figure of the paper anew, and say what is seen in it.\n\n{names}"


def train(
    *,
    dataset: DatasetName | None = None,
    network: NetworkName | None = None,
    optimizer: OptimizerName | None = None,
    lr: float | None = None,
    option: list[str] | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    widths: str | None = None,
    activation: Activation | None = None,
    output: Path | None = None,
    resume: bool = False,
    data_root: Path | None = None,
    log_every: int | None = None,
    checkpoint_every: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Train one network on one data set with one optimizer.

    Args:
        dataset: What to train on; mnist and fashion-mnist are files under --data-root
            [default: digits].
        network: fcn: linear layers; cnn: four convolutions and two linear layers [default: fcn].
        optimizer: The optimizer [default: ddpnopt].
        lr: Learning rate [default: by optimizer].
        option: Option of the optimizer as key=value, such as momentum=0.9 or
            preconditioner=kfac; may be repeated.
        batch_size: Samples per step [default: 8 for digits and wine, else 32].
        epochs: Passes over the training set [default: 10 without --steps].
        steps: Steps; the run ends at whichever of --epochs and --steps comes first.
        seed: Seed of the initial weights and of the data order [default: 0].
        widths: Hidden widths of fcn, such as 32,32,16 [default: by data set].
        activation: Non-linearity of fcn [default: by data set].
        output: Folder for metrics.jsonl, config.json, checkpoint.pt and run.png; without it
            nothing is written.
        resume: Take up the run in --output where its checkpoint left it; settings that are not
            given are those of the run.
        data_root: Folder that holds mnist/ and fashion-mnist/ [default: $OCNOPT_DATA].
        log_every: Steps between rows of metrics.jsonl [default: 50].
        checkpoint_every: Steps between checkpoints [default: at every epoch's end].
        device: Torch device, such as cpu or cuda [default: cpu].
        threads: Threads that torch may use [default: 1 for fcn, torch's own setting for cnn].
        json: Print one JSON object on stdout in place of the progress bar and the summary.
    """
    from ocnopt.experiments.config import TrainConfig, from_json
    from ocnopt.experiments.errors import InputError
    from ocnopt.experiments.options import parse_options, parse_widths

    choices: dict[str, Any] = {
        "dataset": dataset,
        "network": network,
        "optimizer": optimizer,
        "lr": lr,
        "options": None if option is None else parse_options(option),
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "widths": None if widths is None else parse_widths(widths),
        "activation": activation,
        "data_root": data_root,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "device": device,
        "threads": threads,
    }
    given = {name: value for name, value in choices.items() if value is not None}
    if resume and output is None:
        raise InputError("--resume needs the run's folder; give it with --output")
    kept: dict[str, Any] = {}
    if resume and output is not None:
        from ocnopt.experiments.runfolder import RunFolder

        kept = from_json(RunFolder(output).read_config())
        if "steps" in given or "epochs" in given:  # a new end replaces the old one
            kept.update(steps=None, epochs=None)
    config = replace(TrainConfig(**{**kept, **given}), output=output, resume=resume)
    _run(config, json=json)


def _run(config: TrainConfig, *, json: bool) -> None:
    from ocnopt.experiments.training import train

    if json:
        from ocnopt.experiments.files import without_non_finite

        summary = without_non_finite(train(config).summary())
        sys.stdout.write(json_format.dumps(summary) + "\n")
        return
    from rich.console import Console

    from ocnopt.experiments.terminal import TrainProgress, print_result

    with TrainProgress() as progress:
        result = train(config, progress)
    print_result(Console(), result)


def reproduce(
    name: str,
    /,
    *,
    quick: bool = False,
    output: Path | None = None,
    data_root: Path | None = None,
    seeds: int | None = None,
) -> None:
    """Make a figure of the paper anew, and say what is seen in it.

    Args:
        name: Which one; the list is above.
        quick: A small version, of less than a minute.
        output: Folder for NAME.md, NAME.png and NAME.json; older ones are replaced
            [default: runs/NAME]. Figures 6 and 10 to 12 also keep every run in vanishing.jsonl
            there and take up what it holds: delete it to run anew.
        data_root: Folder that holds mnist/ and fashion-mnist/ [default: $OCNOPT_DATA].
        seeds: Number of seeds [default: by experiment].
    """
    from ocnopt.experiments.errors import InputError
    from ocnopt.experiments.reproduce import EXPERIMENTS
    from ocnopt.experiments.reproduce.report import Settings

    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}")
    settings = Settings(name, output or Path("runs") / name, quick, seeds, data_root)
    _reproduce(settings)


def _reproduce(settings: Settings) -> None:
    from rich.console import Console

    from ocnopt.experiments.reproduce import runner
    from ocnopt.experiments.reproduce.terminal import ExperimentProgress, print_report

    with ExperimentProgress(settings.name) as progress:
        report = runner.reproduce(settings, progress)
    print_report(Console(), settings, report)
