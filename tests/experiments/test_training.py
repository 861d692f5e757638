import itertools
import json
import math
import time
from shutil import rmtree

import pytest
import torch

from ocnopt.errors import NonFiniteError, OptionError, SolverError
from ocnopt.experiments import optimizers, training
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.runfolder import RunFolder
from ocnopt.experiments.training import Watcher, train

# Adam and momentum have state that a resumed run has to take over; 17 steps an epoch on wine.
STATEFUL = [
    ("adam", {}),
    ("sgd", {"momentum": 0.9}),
    ("ddpnopt", {"momentum": 0.9}),
    ("ddpnopt", {"preconditioner": "kfac"}),
    ("ekfac", {}),
]
# Optimizers that run the batch themselves, loss = step(x, y).
BATCHWISE = [("vanilla-ddp", {}), ("emsa", {"inner_steps": 2})]


def wine(optimizer="adam", **settings):
    return TrainConfig(**{"dataset": "wine", "optimizer": optimizer, "lr": 0.01, **settings})


def weights(model):
    """All weights as bytes: equal means equal to the last bit."""
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: row[k] for k in row if k not in ("seconds", "cpu_seconds")} for row in rows]


class StopAt(Watcher):
    """Ends a run as a crash would, after a given step."""

    def __init__(self, step):
        self.step = step

    def stepped(self, step, loss):
        if step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("optimizer", "options"), STATEFUL)
@pytest.mark.parametrize("crash", [17, 23, 29], ids=["epoch's end", "between", "just after"])
def test_resume_is_bit_exact(tmp_path, optimizer, options, crash):
    settings = {"optimizer": optimizer, "options": options, "steps": 40, "log_every": 7}
    settings["checkpoint_every"] = 7
    whole = train(wine(**settings, output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(wine(**settings, output=tmp_path / "cut"), StopAt(crash))
    torch.manual_seed(1234)  # whatever the caller's random state is, the run keeps its own
    resumed = train(wine(**settings, output=tmp_path / "cut", resume=True))

    assert weights(resumed.model) == weights(whole.model)
    assert resumed.history.numpy().tobytes() == whole.history.numpy().tobytes()
    assert resumed.train_loss == whole.train_loss
    assert without_times(rows_of(tmp_path / "cut")) == without_times(rows_of(tmp_path / "whole"))


@pytest.mark.parametrize(("optimizer", "options"), BATCHWISE)
def test_optimizers_that_run_the_batch_train_and_resume(tmp_path, optimizer, options):
    settings = {"lr": 1.0, "options": options, "steps": 34, "log_every": 6, "checkpoint_every": 6}
    whole = train(wine(optimizer, **settings, output=tmp_path / "whole"))
    assert whole.history.shape == (34,)
    assert whole.train_loss < float(whole.history[0]) / 2
    start = train(wine("sgd", steps=1))
    assert float(whole.history[0]) == pytest.approx(float(start.history[0]))
    with pytest.raises(KeyboardInterrupt):
        train(wine(optimizer, **settings, output=tmp_path / "cut"), StopAt(14))
    resumed = train(wine(optimizer, **settings, output=tmp_path / "cut", resume=True))
    assert weights(resumed.model) == weights(whole.model)
    assert resumed.history.numpy().tobytes() == whole.history.numpy().tobytes()
    assert without_times(rows_of(tmp_path / "cut")) == without_times(rows_of(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["vanilla-ddp", "emsa"])
def test_divergence_of_one_that_runs_the_batch_is_a_result(name, monkeypatch):
    kind, steps = optimizers._class(name), []
    step = kind._step

    def failing(self, args, targets):
        steps.append(step)
        if len(steps) == 4:
            raise NonFiniteError("a loss is not finite")
        return step(self, args, targets)

    monkeypatch.setattr(kind, "_step", failing)
    result = train(wine(name, lr=1.0, widths=(4,), steps=9))
    assert result.diverged_step == 4
    assert result.history.shape == (4,)
    assert math.isnan(result.train_loss)
    assert 0 < result.test_accuracy <= 1


@pytest.mark.parametrize("curve", [False, True])
def test_a_curve_has_an_accuracy_at_every_row(curve):
    result = train(wine("sgd", steps=20, log_every=5, curve=curve))
    assert [row["step"] for row in result.rows] == [5, 10, 15, 17, 20]
    known = [row["step"] for row in result.rows if row["test_accuracy"] is not None]
    assert known == ([5, 10, 15, 17, 20] if curve else [17, 20])


def test_a_run_with_a_validation_split_is_not_resumed_without(tmp_path):
    train(wine(steps=3, validation=0.2, output=tmp_path))
    with pytest.raises(InputError, match=r"validation: 0\.2, not 0\.0"):
        train(wine(steps=3, output=tmp_path, resume=True))


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (0.5, [0, 9, 17, 26, 34]),  # 17 steps an epoch: halves are at 8.5, 17, 25.5 and 34
        (1, [0, 17, 34]),
        (0.1, [0, 2, 4, 6, 7, 9, 11, 12, 14, 16, 17, 19, 21, 23, 24, 26, 28, 29, 31, 33, 34]),
        (0.01, list(range(35))),  # more often than there are steps
        (1.5, [0, 26, 34]),
        (9, [0, 34]),
    ],
)
def test_evaluations_have_a_rhythm_of_their_own(every, steps):
    plain = train(wine("sgd", batch_size=8, epochs=2, log_every=5))
    assert plain.steps_per_epoch == 17
    result = train(wine("sgd", batch_size=8, epochs=2, log_every=5, evaluate_every=every))
    rows = [row for row in result.rows if row["test_accuracy"] is not None]
    assert [row["step"] for row in rows] == steps
    assert rows[0]["train_loss"] is None and rows[0]["seconds"] == rows[0]["cpu_seconds"] == 0
    for before, row in itertools.pairwise(rows):
        assert row["seconds"] > before["seconds"]
        # The clock of the processor may be too coarse for a single step.
        assert row["cpu_seconds"] >= before["cpu_seconds"]
    # Looking does not change what is seen.
    assert weights(result.model) == weights(plain.model)
    assert result.test_accuracy == plain.test_accuracy == rows[-1]["test_accuracy"]


def test_neither_clock_counts_evaluations(monkeypatch):
    """Nor does the processor's count waiting."""
    accuracy = training._Run._accuracy

    def slow(self):
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            pass
        return accuracy(self)

    class Waiting(Watcher):
        def stepped(self, step, loss):
            time.sleep(0.02)

    monkeypatch.setattr(training._Run, "_accuracy", slow)
    started, cpu = time.perf_counter(), time.thread_time()
    row = train(wine("sgd", steps=10, evaluate_every=0.01), Waiting()).rows[-1]
    wall, cpu = time.perf_counter() - started, time.thread_time() - cpu
    assert 10 * 0.02 <= row["seconds"] <= wall - 11 * 0.05
    assert row["cpu_seconds"] <= min(cpu - 0.05, row["seconds"] - 0.15)


def test_a_resumed_run_goes_on_with_its_clocks(tmp_path):
    settings = {"steps": 34, "evaluate_every": 0.5, "log_every": 100}
    with pytest.raises(KeyboardInterrupt):
        train(wine(**settings, output=tmp_path), StopAt(20))
    before = rows_of(tmp_path)[-1]
    assert before["step"] == 17
    whole = train(wine(**settings, output=tmp_path, resume=True))
    assert [row["step"] for row in whole.rows] == [0, 9, 17, 26, 34]
    assert whole.rows[2] == before
    assert whole.rows[3]["cpu_seconds"] >= before["cpu_seconds"] > 0
    assert whole.rows[3]["seconds"] > before["seconds"]


class _Overflowing(torch.nn.Linear):
    """Has no outputs for the second half of the test set, as a solver that overflows."""

    def forward(self, x):
        if not self.training and len(x) != 1000:
            raise SolverError("steps underflow")
        return super().forward(x)


def test_samples_that_no_solver_gets_through_are_wrong_answers(monkeypatch):
    x = torch.cat([-torch.ones(750, 1), torch.ones(750, 1)])
    data = Data(x[700:800], (x[700:800, 0] > 0).long(), x, (x[:, 0] > 0).long(), 2)
    monkeypatch.setattr(training, "load_data", lambda config: data)
    monkeypatch.setattr(training, "build_network", lambda *_: _Overflowing(1, 2))
    result = train(wine("sgd", lr=1.0, steps=20, batch_size=20))
    assert result.diverged_step is None
    assert result.test_accuracy == pytest.approx(1000 / 1500)


def test_resume_drops_rows_after_the_checkpoint_and_a_torn_line(tmp_path):
    settings = {"steps": 40, "log_every": 5}
    whole = train(wine(**settings, output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(wine(**settings, output=tmp_path / "cut"), StopAt(33))
    metrics = tmp_path / "cut" / "metrics.jsonl"
    assert [row["step"] for row in rows_of(tmp_path / "cut")][-1] == 30  # checkpoint: 17
    with metrics.open("a") as file:
        file.write('{"step": 35, "train_l')
    train(wine(**settings, output=tmp_path / "cut", resume=True))
    assert without_times(rows_of(tmp_path / "cut")) == without_times(whole.rows)


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    whole = train(wine(steps=20))
    with pytest.raises(KeyboardInterrupt):
        train(wine(steps=20, output=tmp_path), StopAt(5))
    assert weights(train(wine(steps=20, output=tmp_path, resume=True)).model) == weights(
        whole.model
    )


def test_resume_can_train_for_longer(tmp_path):
    whole = train(wine(steps=40))
    train(wine(steps=25, output=tmp_path))
    longer = train(wine(steps=40, output=tmp_path, resume=True))
    assert weights(longer.model) == weights(whole.model)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 40
    with pytest.raises(InputError, match="already done 40 steps"):
        train(wine(steps=30, output=tmp_path, resume=True))


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    first = train(wine(steps=20, output=tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    again = train(wine(steps=20, output=tmp_path, resume=True))
    assert weights(again.model) == weights(first.model)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert again.test_accuracy == first.test_accuracy
    assert again.seconds == first.seconds


def test_resume_refuses_another_run(tmp_path):
    train(wine(steps=3, output=tmp_path / "a"))
    with pytest.raises(InputError, match=r"lr: 0\.01, not 0\.02"):
        train(wine(steps=3, lr=0.02, output=tmp_path / "a", resume=True))
    with pytest.raises(InputError, match="holds no run"):
        train(wine(steps=3, output=tmp_path / "b", resume=True))


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_damaged_checkpoint_is_named(tmp_path, damage):
    train(wine(steps=3, output=tmp_path))
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-300] if damage is None else damage)
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read"):
        train(wine(steps=3, output=tmp_path, resume=True))


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"step": "x"}\n'])
def test_damaged_metrics_are_left_out(tmp_path, damage):
    train(wine(steps=4, log_every=1, output=tmp_path))
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    again = train(wine(steps=4, log_every=1, output=tmp_path, resume=True))
    assert [row["step"] for row in again.rows] == [1, 2]


def test_a_folder_that_vanishes_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(
        RunFolder,
        "save",
        lambda self, state, save=RunFolder.save: (rmtree(folder), save(self, state)),
    )
    with pytest.raises(InputError, match=r"cannot write to .*run: No such file"):
        train(wine(steps=4, output=folder))


def test_a_folder_with_a_run_is_left_alone(tmp_path):
    train(wine(steps=3, output=tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="already holds a run"):
        train(wine(steps=3, seed=1, output=tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write"):
        train(wine(steps=3, output=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_options_leave_no_folder_behind(tmp_path):
    with pytest.raises(InputError):
        train(wine(options={"nobody": 1}, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_a_run_writes(tmp_path):
    result = train(wine("ddpnopt", lr=0.1, epochs=2, log_every=5, output=tmp_path / "run"))
    folder = tmp_path / "run"
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["checkpoint.pt", "config.json", "metrics.jsonl", "run.png"]
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [5, 10, 15, 17, 20, 25, 30, 34]
    assert rows == result.rows
    for row in rows:
        ends_epoch = row["step"] % 17 == 0
        assert (row["test_accuracy"] is not None) == ends_epoch
        assert "predicted_decrease" in row["diagnostics"]
    assert rows[1]["train_loss"] == pytest.approx(float(result.history[5:10].mean()))
    assert rows[-1]["epoch"] == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == 8
    assert config["lr"] == 0.1
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 34
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_history_holds_every_step_and_the_result_its_last_epoch():
    result = train(wine(steps=40))
    assert result.history.shape == (40,)
    assert bool(torch.isfinite(result.history).all())
    assert result.train_loss == pytest.approx(float(result.history[-17:].mean()))
    assert 0 <= result.test_accuracy <= 1
    assert result.diverged_step is None
    assert result.steps_per_epoch == 17


def test_same_seed_same_run_and_same_start_for_every_optimizer():
    assert weights(train(wine(steps=10)).model) == weights(train(wine(steps=10)).model)
    first = {name: train(wine(name, steps=1)).history[0] for name in ("adam", "sgd", "ddpnopt")}
    assert len({float(loss) for loss in first.values()}) == 1
    assert float(train(wine(steps=1, seed=1)).history[0]) not in map(float, first.values())


def test_the_caller_keeps_random_state_and_threads():
    torch.manual_seed(5)
    expected = torch.rand(3)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    train(wine(steps=2, threads=2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["sgd", "ddpnopt"])
def test_training_learns(name):
    result = train(wine(name, lr=0.1, epochs=10))
    assert result.test_accuracy > 0.85
    assert result.train_loss < result.history[0] / 3


def test_cnn_trains_on_image_files(mnist_root):
    result = train(
        TrainConfig(
            dataset="mnist",
            network="cnn",
            optimizer="sgd",
            batch_size=20,
            steps=4,
            data_root=mnist_root,
        )
    )
    assert result.steps == 4
    assert result.config.widths is None


class _Exploding(torch.optim.SGD):
    """Leaves weights that are not finite, as torch's own optimizers do."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 12:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.fill_(math.inf)
        return super().step(closure)


class _Refusing(torch.optim.SGD):
    """Raises and leaves the weights alone, as the library's own optimizers do."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 13:
            raise NonFiniteError("a loss is not finite")
        return super().step(closure)


@pytest.mark.parametrize("kind", [_Exploding, _Refusing])
def test_divergence_is_a_result(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(optimizers, "_class", lambda name: kind)
    monkeypatch.setattr(kind, "__module__", "torch.optim.stand_in")
    result = train(wine("sgd", steps=40, log_every=5, checkpoint_every=10, output=tmp_path))
    assert result.diverged_step == 13
    assert math.isnan(result.train_loss)
    assert result.history.shape == (13,)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 13]
    assert rows[-1]["diverged"] is True
    assert rows[-1]["train_loss"] is None
    assert result.summary()["diverged"] is True
    # The checkpoint is the last good one.
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 10
    assert all(bool(torch.isfinite(value).all()) for value in state["model"].values())
    # Outputs that are not finite are wrong answers, not class 0.
    assert result.test_accuracy == 0 or kind is _Refusing


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match="batch-size 500 is more than the 142"):
        train(wine(batch_size=500))


def test_unusable_device_is_refused():
    with pytest.raises(InputError, match="--device cpu"):
        train(wine(device="nowhere"))


def test_no_loss_is_read_between_rows(monkeypatch):
    read = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(1) or item(self))
    monkeypatch.setattr(training._Run, "_log", lambda *args, **kwargs: None)
    train(wine("sgd", steps=16, log_every=16))
    assert len(read) <= 2


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_resumed_run_that_is_refused_changes_nothing(tmp_path):
    train(wine(steps=20, output=tmp_path))
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="already done 20 steps"):
        train(wine(steps=10, output=tmp_path, resume=True))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_first_step_that_is_refused_leaves_no_run(tmp_path, there):
    """What an optimizer says of the network is bad input: one line, and the folder is free."""
    output = tmp_path / "run"
    if there:
        output.mkdir()
    settings = {"dataset": "digits", "network": "residual-fcn", "steps": 3, "lr": 0.1}
    with pytest.raises(InputError, match="step 1: "):
        train(TrainConfig(**settings, optimizer="emsa", output=output, evaluate_every=0.5))
    assert output.exists() == there
    assert not there or not list(output.iterdir())
    train(TrainConfig(**settings, optimizer="sgd", output=output))


def test_a_later_failure_keeps_the_run(tmp_path, monkeypatch):
    """What was trained until then can be taken up."""
    calls = itertools.count()
    step = torch.optim.Adam.step

    def failing(self, *args):
        if next(calls) == 25:
            raise OptionError("not now")
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", failing)
    with pytest.raises(InputError, match="step 26: not now"):
        train(wine(steps=40, output=tmp_path, checkpoint_every=10))
    monkeypatch.undo()
    again = train(wine(steps=40, output=tmp_path, checkpoint_every=10, resume=True))
    assert weights(again.model) == weights(train(wine(steps=40)).model)
