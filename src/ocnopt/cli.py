"""The command line. Nothing heavy is imported before a command runs, so that help is instant."""

from __future__ import annotations

import importlib.util
import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocnopt.experiments.problems import Activation, Head, Norm

if TYPE_CHECKING:
    from cyclopts import App

    from ocnopt.experiments.compare import Contender
    from ocnopt.experiments.config import TrainConfig
    from ocnopt.experiments.reproduce.report import Report, Settings

BAD_INPUT = 2
INTERRUPTED = 130

_COMMANDS = ("train", "compare", "inspect", "reproduce", "data")
_INTERRUPTED = {
    "train": "a run with --output goes on from its last checkpoint with --resume",
    "compare": "finished runs are in the cache, and the same command goes on from there",
    "inspect": "no picture was written",
    "reproduce": "no page was written",
    "data": "files that are there are whole, and the same command goes on with the others",
}


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
        command = f"ocnopt {words[0]}" if words and words[0] in _COMMANDS else "ocnopt"
        return _fail(f"{error} See {command} --help.")
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"interrupted; {_INTERRUPTED.get(words[0] if words else '', 'nothing was done')}")
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
    from ocnopt.experiments.data.commands import data_app
    from ocnopt.experiments.options import require_whole

    app = App(
        name="ocnopt",
        help="Optimal-control optimizers for PyTorch.",
        version=__version__,
        default_parameter=Parameter(negative=(), show_default=False),
        suppress_keyboard_interrupt=False,
        config=require_whole,
    )
    app.command(train)
    app.command(compare)
    app.command(inspect)
    app.command(reproduce, help=_reproduce_help())
    app.command(data_app())
    return app


def _reproduce_help() -> str:
    from ocnopt.experiments.reproduce import EXPERIMENTS

    names = "\n".join(f"- {name}: {entry.shows}" for name, entry in EXPERIMENTS.items())
    return f"Make a figure of the paper anew, and say what is seen in it.\n\n{names}"


def train(
    *,
    recipe: str | None = None,
    dataset: str | None = None,
    network: str | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    option: list[str] | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    widths: str | None = None,
    activation: Activation | None = None,
    head: Head | None = None,
    depth: int | None = None,
    norm: Norm | None = None,
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
        recipe: Settings of one of the papers' problems, which other options change: wine-fcn,
            digits-fcn, mnist-fcn, fashion-mnist-fcn, mnist-cnn, svhn-cnn, cifar-10-cnn,
            digits-deep; digits-residual, mnist-residual, fashion-mnist-residual, cifar-10-residual,
            cifar-10-resnet18; digits-inception, mnist-inception, fashion-mnist-inception,
            cifar-10-inception; mnist-ode, fashion-mnist-ode, cifar-10-ode, cifar-10-ode-full,
            articulary-word-recognition-ode, articulary-word-recognition-ode-full or
            character-trajectories-half-ode.
        dataset: What to train on: digits, wine, clusters, mnist, fashion-mnist, cifar-10, svhn (see
            ocnopt data list), or your own as module:function, which returns train_x, train_y,
            test_x and test_y [default: digits].
        network: fcn: linear layers; cnn: four convolutions and two linear layers; residual-fcn and
            residual-cnn: blocks with shortcuts; inception: blocks with branches; ode-cnn:
            convolutions about a Neural ODE; gru-ode: for time series, a Neural ODE from observation
            to observation; or your own as module:function, called with the shape of an input and
            the number of classes [default: fcn].
        optimizer: ddpnopt, dgnopt, kfac, ekfac, sgd, rmsprop, adam, vanilla-ddp, emsa, snopt (for
            networks with Neural ODEs), ocnopt (for any), or any other as package.module:Class
            [default: ddpnopt].
        lr: Learning rate [default: by optimizer].
        option: Option of the optimizer as key=value, such as momentum=0.9 or
            preconditioner=kfac; may be repeated. With rest_lr=RATE the optimizer trains the Neural
            ODEs of a network alone, and Adam, at this rate, all that lies outside of them.
        batch_size: Samples per step [default: 8 for digits, wine and clusters, 128 for cifar-10 and
            svhn, else 32].
        epochs: Passes over the training set [default: 10 without --steps].
        steps: Steps; the run ends at whichever of --epochs and --steps comes first.
        seed: Seed of the initial weights and of the data order [default: 0].
        widths: Hidden widths of fcn, such as 32,32,16; widths or channels of the blocks of
            residual-fcn, residual-cnn and inception [default: by network and data set].
        activation: Non-linearity of fcn and residual-fcn [default: by data set].
        head: What fcn applies to its outputs [default: identity].
        depth: Layers on the main path of a residual block [default: 2].
        norm: Normalization in residual-cnn and inception [default: none].
        output: Folder for metrics.jsonl, config.json, checkpoint.pt and run.png; without it
            nothing is written.
        resume: Take up the run in --output where its checkpoint left it; settings that are not
            given are those of the run.
        data_root: Folder that holds the data [default: $OCNOPT_DATA, else a folder in the cache].
        log_every: Steps between rows of metrics.jsonl [default: 50].
        checkpoint_every: Steps between checkpoints [default: at every epoch's end].
        device: Torch device, such as cpu or cuda [default: cpu].
        threads: Threads that torch may use [default: 1 for fcn, residual-fcn and gru-ode,
            torch's own setting for the others].
        json: Print one JSON object on stdout in place of the progress bar and the summary.
    """
    from ocnopt.experiments.choices import with_recipe
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
        "head": head,
        "depth": depth,
        "norm": norm,
        "data_root": data_root,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "device": device,
        "threads": threads,
    }
    given = with_recipe(recipe, choices)
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


def compare(
    *,
    optimizer: list[str] | None = None,
    lr: str | None = None,
    recipe: str | None = None,
    dataset: str | None = None,
    network: str | None = None,
    widths: str | None = None,
    activation: Activation | None = None,
    head: Head | None = None,
    depth: int | None = None,
    norm: Norm | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    seeds: int = 3,
    margin: float = 1.0,
    validation: float = 0.1,
    output: Path = Path("runs/compare"),
    cache: Path = Path("runs/cache"),
    data_root: Path | None = None,
    processes: int | None = None,
    json: bool = False,
) -> None:
    """Compare optimizers on a problem of the paper's or your own.

    Every optimizer is trained at each of its learning rates; fresh seeds at the best of them, as
    validation samples tell, are what is reported, with the range of learning rates that work and
    the time of a step.

    Args:
        optimizer: An optimizer, with its options and, if you like, a sweep of its own, as in
            'ddpnopt preconditioner=rmsprop lr=0.001:0.1:7'; any of ddpnopt, dgnopt, kfac, ekfac,
            sgd, rmsprop, adam, vanilla-ddp, emsa, snopt, ocnopt, or package.module:Class. To be
            repeated: the first is what times are relative to [default: sgd, adam and ddpnopt].
        lr: Learning rates of all others: FROM:TO:COUNT with even ratios, as in 0.01:1:7, or a list,
            as in 0.1,0.2,0.4 [default: eight, from a tenth to 30 times the optimizer's usual one].
        recipe: Settings of one of the papers' problems, which other options change: wine-fcn,
            digits-fcn, mnist-fcn, fashion-mnist-fcn, mnist-cnn, svhn-cnn, cifar-10-cnn,
            digits-deep; digits-residual, mnist-residual, fashion-mnist-residual, cifar-10-residual,
            cifar-10-resnet18; digits-inception, mnist-inception, fashion-mnist-inception,
            cifar-10-inception; mnist-ode, fashion-mnist-ode, cifar-10-ode, cifar-10-ode-full,
            articulary-word-recognition-ode, articulary-word-recognition-ode-full or
            character-trajectories-half-ode.
        dataset: digits, wine, clusters, mnist, fashion-mnist, cifar-10, svhn, or your own as
            module:function, which returns train_x, train_y, test_x and test_y [default: digits].
        network: fcn, cnn, residual-fcn, residual-cnn, inception, ode-cnn, gru-ode, or your own as
            module:function, called with the shape of an input and the number of classes
            [default: fcn].
        widths: Hidden widths of fcn, such as 32,32,16; widths or channels of the blocks of
            residual-fcn, residual-cnn and inception [default: by network and data set].
        activation: Non-linearity of fcn and residual-fcn [default: by data set].
        head: What fcn applies to its outputs [default: identity].
        depth: Layers on the main path of a residual block [default: 2].
        norm: Normalization in residual-cnn and inception [default: none].
        batch_size: Samples per step [default: by data set].
        epochs: Passes over the training set [default: 10 without --steps].
        steps: Steps of every run.
        seeds: Seeds per learning rate, and of the final runs [default: 3].
        margin: Percentage points of accuracy that a workable learning rate may be below the best
            [default: 1].
        validation: Share of the training set that learning rates are compared on [default: 0.1].
        output: Folder for compare.html, .md and .json, sensitivity.png and curves.png; older ones
            are replaced [default: runs/compare].
        cache: Folder that keeps every finished run, so that none is trained twice
            [default: runs/cache].
        data_root: Folder that holds the data [default: $OCNOPT_DATA, else a folder in the cache].
        processes: Worker processes [default: one per core].
        json: Print one JSON object on stdout in place of the progress bar and the table.
    """
    from ocnopt.experiments.choices import with_recipe
    from ocnopt.experiments.config import TrainConfig
    from ocnopt.experiments.errors import InputError
    from ocnopt.experiments.options import parse_widths

    if not 0 < validation < 1:
        raise InputError(f"validation must be a share above 0 and below 1, not {validation:g}")
    if processes is not None and processes < 1:
        raise InputError(f"processes must be at least 1, not {processes}")
    given = {
        "dataset": dataset,
        "network": network,
        "widths": None if widths is None else parse_widths(widths),
        "activation": activation,
        "head": head,
        "depth": depth,
        "norm": norm,
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "data_root": data_root,
        "validation": validation,
    }
    base = TrainConfig(**with_recipe(recipe, given))
    from ocnopt.experiments import compare as comparing

    rates = None if lr is None else comparing.parse_rates(lr)
    contenders = [
        comparing.parse_contender(text, rates) for text in optimizer or ("sgd", "adam", "ddpnopt")
    ]
    comparing.require_folder(output)
    options: dict[str, Any] = {
        "seeds": seeds,
        "margin": margin,
        "cache": comparing.Cache(cache),
        "processes": processes,
    }
    _compare(contenders, base, output, options, json=json)


def _compare(
    contenders: list[Contender],
    base: TrainConfig,
    output: Path,
    options: dict[str, Any],
    *,
    json: bool,
) -> None:
    from ocnopt.experiments import compare as comparing

    if json:
        from ocnopt.experiments.files import without_non_finite

        comparison = comparing.compare(contenders, base, **options)
        comparing.save(comparison, output)
        plain = without_non_finite({**comparison.to_json(curves=False), "output": str(output)})
        sys.stdout.write(json_format.dumps(plain) + "\n")
        return
    from rich.console import Console

    from ocnopt.experiments.compare.terminal import print_comparison
    from ocnopt.experiments.reproduce.terminal import ExperimentProgress

    with ExperimentProgress("comparing") as progress:
        comparison = comparing.compare(contenders, base, watcher=progress, **options)
    print_comparison(Console(), comparison, output, comparing.save(comparison, output))


def inspect(
    *,
    recipe: str | None = None,
    dataset: str | None = None,
    network: str | None = None,
    widths: str | None = None,
    activation: Activation | None = None,
    depth: int | None = None,
    norm: Norm | None = None,
    alignment: int = 0,
    output: Path | None = None,
    data_root: Path | None = None,
    json: bool = False,
) -> None:
    """Show a network as a game: stages, the layers that act together at each, what is alive.

    Args:
        recipe: Network and data set of one of the papers' problems, such as digits-residual or
            digits-inception (see ocnopt train), which other options change.
        dataset: digits, wine, clusters, mnist, fashion-mnist, cifar-10, svhn, none of which is
            read, or your own as module:function, which returns train_x, train_y, test_x and test_y
            [default: digits].
        network: fcn, cnn, residual-fcn, residual-cnn, inception, ode-cnn, gru-ode, or your own as
            module:function, called with the shape of an input and the number of classes
            [default: fcn].
        widths: Widths, or channels, such as 32,32,16 [default: by network and data set].
        activation: Non-linearity of fcn and residual-fcn [default: by data set].
        depth: Layers on the main path of a residual block [default: 2].
        norm: Normalization in residual-cnn and inception [default: none].
        alignment: Which alignment to show, counted from 0, the earliest; -1 is the latest
            [default: 0].
        output: Folder for game.png and game.json; older ones are replaced.
        data_root: Folder that holds the data [default: $OCNOPT_DATA, else a folder in the cache].
        json: Print one JSON object on stdout in place of the table.
    """
    from ocnopt.experiments.choices import with_recipe
    from ocnopt.experiments.config import TrainConfig
    from ocnopt.experiments.options import parse_widths

    given = {
        "dataset": dataset,
        "network": network,
        "widths": None if widths is None else parse_widths(widths),
        "activation": activation,
        "depth": depth,
        "norm": norm,
        "data_root": data_root,
    }
    config = TrainConfig(**with_recipe(recipe, given))
    from ocnopt.experiments import inspection

    seen = inspection.inspect_network(config, alignment)
    written = [] if output is None else inspection.save(seen, output)
    if json:
        sys.stdout.write(json_format.dumps(seen.to_json()) + "\n")
        return
    from rich.console import Console

    from ocnopt.experiments.inspection.terminal import print_inspection

    print_inspection(Console(), seen)
    if output is not None:
        sys.stdout.write(f"written: {', '.join(written)} in {output}\n")


def reproduce(
    name: str,
    /,
    *,
    quick: bool = False,
    output: Path | None = None,
    data_root: Path | None = None,
    seeds: int | None = None,
    cache: Path = Path("runs/cache"),
    processes: int | None = None,
) -> None:
    """Make a figure or table of the paper anew, and say what is seen in it.

    Args:
        name: Which one; the list is above. all: every one of them.
        quick: A small version, of a minute or two.
        output: Folder for NAME.md, .html, .png and .json; older ones are replaced
            [default: runs/NAME]. Figures 6 and 10 to 12 also keep every run in vanishing.jsonl
            there and take up what it holds: delete it to run anew.
        data_root: Folder that holds one folder per data set, see ocnopt data list
            [default: $OCNOPT_DATA].
        seeds: Number of seeds [default: by experiment].
        cache: Folder in which tables and grids keep every run, to go on after an interruption and
            to share runs among experiments [default: runs/cache].
        processes: Worker processes of a grid [default: one per core].
    """
    from ocnopt.experiments.errors import InputError
    from ocnopt.experiments.reproduce import EXPERIMENTS
    from ocnopt.experiments.reproduce.report import Settings

    if name != "all" and name not in EXPERIMENTS:
        raise InputError(
            f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}, or all"
        )
    if processes is not None and processes < 1:
        raise InputError(f"processes must be at least 1, not {processes}")
    settings = Settings(
        name, output or Path("runs") / name, quick, seeds, data_root, cache, processes
    )
    if name != "all":
        _reproduce(settings)
        return
    from ocnopt.experiments.reproduce.everything import reproduce_all

    reproduce_all(settings, _reproduce, _skipped)


def _skipped(name: str, why: str) -> None:
    sys.stderr.write(f"{name}: {' '.join(why.split())}\n")


def _reproduce(settings: Settings) -> Report:
    from rich.console import Console

    from ocnopt.experiments.reproduce import runner
    from ocnopt.experiments.reproduce.terminal import ExperimentProgress, print_report

    with ExperimentProgress(settings.name) as progress:
        report = runner.reproduce(settings, progress)
    print_report(Console(), settings, report)
    return report
