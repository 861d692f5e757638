"""Grids: order, grouping, cache, worker processes."""

import itertools
import json
import sys
from dataclasses import replace

import joblib
import pytest
import torch
from joblib import parallel

from ocnopt.experiments import cache as cache_module
from ocnopt.experiments import grid, together, training
from ocnopt.experiments.cache import Cache, key_of
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.watcher import Watcher

_NUMBERS = itertools.count()


def wine(**settings):
    given = {"dataset": "wine", "optimizer": "sgd", "lr": 0.1, "widths": (4,), "steps": 3}
    return TrainConfig(**{**given, **settings})


def timeless(outcomes):
    return [replace(outcome, seconds_per_step=0.0) for outcome in outcomes]


MIXED = [
    wine(seed=2),
    wine(lr=0.5, seed=0),
    wine(seed=0),
    wine(optimizer="ddpnopt", seed=1),
    wine(seed=1),
    wine(optimizer="ddpnopt", seed=0),
]


@pytest.fixture
def ran(monkeypatch):
    """What was run: (optimizer, learning rate, seeds), in this process."""
    jobs, run = [], grid._run

    def spy(job):
        jobs.append((job.config.optimizer, job.config.lr, job.seeds))
        return run(job)

    monkeypatch.setattr(grid, "_run", spy)
    return jobs


class Told(Watcher):
    """What a watcher hears; may end the grid as an interruption would."""

    def __init__(self, until=None):
        self.total, self.parts, self.until = None, [], until

    def start(self, total):
        self.total = total

    def advance(self, text=""):
        self.parts.append(text)
        if self.until is not None and len(self.parts) >= self.until:
            raise KeyboardInterrupt


def test_outcomes_are_in_the_order_of_their_configurations(ran):
    told = Told()
    outcomes = run_grid(MIXED, processes=1, watcher=told)
    assert [o.seed for o in outcomes] == [c.seed for c in MIXED]
    for config, found in zip(MIXED, outcomes, strict=True):
        expected = training.train(config)
        assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
        assert found.test_accuracy == expected.test_accuracy
    assert ran == [("sgd", 0.1, (2, 0, 1)), ("sgd", 0.5, (0,)), ("ddpnopt", 0.1, (1, 0))]
    assert told.total == len(told.parts) == 6
    assert sorted(told.parts)[0] == "wine ddpnopt lr 0.1"


def test_nothing_is_grouped_where_that_is_not_wanted_or_possible(ran):
    apart = run_grid(MIXED, processes=1, together=False)
    assert [seeds for *_, seeds in ran] == [(c.seed,) for c in MIXED]
    ran.clear()
    for one, other in zip(apart, run_grid(MIXED, processes=1), strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
    ran.clear()
    # Seeds are all in which runs that are trained together may differ.
    different = [wine(steps=2), wine(options={"momentum": 0.5}), wine(validation=0.2)]
    different += [wine(optimizer="vanilla-ddp", seed=s) for s in (0, 1)]
    run_grid(different, processes=1)
    assert [seeds for *_, seeds in ran] == [(0,), (0,), (0,), (0,), (1,)]


def test_the_same_run_twice_is_run_once(ran, tmp_path):
    told = Told()
    twice = [wine(), wine(seed=1), wine(), wine(optimizer="emsa"), wine(optimizer="emsa")]
    outcomes = run_grid(twice, processes=1, cache=Cache(tmp_path), watcher=told)
    assert [seeds for *_, seeds in ran] == [(0, 1), (0,)]
    assert outcomes[0] == outcomes[2] and outcomes[3] == outcomes[4]
    assert [o.seed for o in outcomes] == [0, 1, 0, 0, 0]
    assert len(told.parts) == 5


def test_no_configurations_are_no_outcomes():
    assert run_grid([]) == []


def test_curves_where_they_are_asked_for():
    given = [wine(curve=curve, seed=s) for curve in (True, False) for s in (0, 1)]
    given.append(replace(given[0], optimizer="emsa", lr=1.0))
    with_curve, _, without, _, alone = run_grid(given, processes=1)
    assert [step for step, _ in with_curve.losses] == [1, 2, 3]
    assert with_curve.accuracies == ((3, with_curve.test_accuracy),)
    assert without.losses == without.accuracies == ()
    assert [step for step, _ in alone.losses] == [1, 2, 3]
    assert alone.accuracies == ((3, alone.test_accuracy),)


def test_runs_that_are_timed_keep_their_clock_and_run_alone(ran):
    timed = [wine(seed=s, steps=20, evaluate_every=0.5) for s in (0, 1)]
    outcomes = run_grid([*timed, wine(seed=2, steps=20)], processes=1)
    assert [seeds for *_, seeds in ran] == [(0,), (1,), (2,)]
    for found in outcomes[:2]:
        assert [step for step, _ in found.accuracies] == [0, 9, 17, 20]
        assert [step for step, *_ in found.clock] == [0, 9, 17, 20]
        for (_, cpu, wall), (_, later, more) in itertools.pairwise(found.clock):
            assert cpu <= later and wall < more
        assert len(found.losses) == 20
        assert found.seconds_per_step == pytest.approx(found.clock[-1][2] / 20)
    assert outcomes[2].clock == outcomes[2].accuracies == ()
    # What is trained together has the same numbers, though no times.
    assert outcomes[2].train_loss == run_grid([wine(seed=2, steps=20, curve=True)])[0].train_loss


def test_the_clock_ends_where_a_run_diverges():
    (found,) = run_grid([wine(lr=1e30, activation="relu", steps=20, evaluate_every=0.5)])
    assert found.failed and found.diverged_step == 2
    assert [step for step, *_ in found.clock] == [step for step, _ in found.accuracies] == [0]


def test_output_folders_are_not_used(tmp_path):
    run_grid([wine(output=tmp_path / "run")], processes=1)
    assert not (tmp_path / "run").exists()


# Cache


def test_a_second_call_runs_nothing(ran, tmp_path):
    first = run_grid(MIXED, cache=Cache(tmp_path / "new"), processes=1)
    assert len(ran) == 3
    told = Told()
    again = run_grid(MIXED[::-1], cache=Cache(tmp_path / "new"), processes=1, watcher=told)
    assert again == first[::-1]
    assert len(ran) == 3
    assert len(told.parts) == told.total == 6


def test_without_a_folder_nothing_is_kept(ran):
    for _ in range(2):
        run_grid([wine()], cache=Cache(None), processes=1)
    assert len(ran) == 2


REST = [("sgd", 0.5, (0,)), ("sgd", 0.9, (0,))]


@pytest.mark.parametrize(("after", "rest"), [(1, REST), (3, REST), (4, REST[1:])])
def test_an_interrupted_grid_goes_on_with_the_rest(ran, tmp_path, after, rest):
    """What was trained together is kept together, wherever among it the grid ends."""
    configs = [wine(), wine(seed=1), wine(seed=2), wine(lr=0.5), wine(lr=0.9)]
    with pytest.raises(KeyboardInterrupt):
        run_grid(configs, cache=Cache(tmp_path), processes=1, watcher=Told(after))
    assert ran[0] == ("sgd", 0.1, (0, 1, 2))
    assert len(ran) == 3 - len(rest)
    ran.clear()
    outcomes = run_grid(configs, cache=Cache(tmp_path), processes=1)
    assert ran == rest
    assert timeless(outcomes) == timeless(run_grid(configs, processes=1))


@pytest.mark.filterwarnings("ignore:.*have been cancelled")
def test_an_interrupted_grid_of_workers_goes_on_with_the_rest(tmp_path):
    configs = [wine(lr=lr) for lr in (0.1, 0.2, 0.3, 0.4)]
    with (
        joblib.parallel_config(backend="threading", n_jobs=2),
        pytest.raises(KeyboardInterrupt),
    ):
        run_grid(configs, cache=Cache(tmp_path), watcher=Told(2))
    # What was told of is kept; a run that was over meanwhile may be, too.
    assert 2 <= len(list(tmp_path.rglob("*.json"))) <= 4
    outcomes = run_grid(configs, cache=Cache(tmp_path), processes=1)
    assert len(list(tmp_path.rglob("*.json"))) == 4
    assert timeless(outcomes) == timeless(run_grid(configs, processes=1))


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"{}", b"null", b"\xff", b'{"outcome": []}', b'{"outcome": {"seed": 1}}'],
)
def test_a_damaged_file_is_run_again(ran, tmp_path, damage):
    (first,) = run_grid([wine()], cache=Cache(tmp_path), processes=1)
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(damage)
    (again,) = run_grid([wine()], cache=Cache(tmp_path), processes=1)
    assert len(ran) == 2
    assert again.train_loss == first.train_loss
    assert Outcome.from_json(json.loads(file.read_text())["outcome"]) == again


def test_a_cache_that_cannot_be_written_to_is_named_before_anything_runs(ran, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        run_grid([wine()], cache=Cache(file), processes=1)
    assert not ran
    assert file.read_text() == "mine"


def test_a_field_that_is_missing_or_new_is_run_again(ran, tmp_path):
    run_grid([wine()], cache=Cache(tmp_path), processes=1)
    (file,) = tmp_path.rglob("*.json")
    kept = json.loads(file.read_text())
    del kept["outcome"]["steps"]
    file.write_text(json.dumps(kept))
    run_grid([wine()], cache=Cache(tmp_path), processes=1)
    assert len(ran) == 2


def test_a_curve_that_is_asked_for_later_is_run_for(ran, tmp_path):
    def run(**settings):
        return run_grid([wine(steps=8, **settings)], cache=Cache(tmp_path), processes=1)[0]

    assert run().losses == ()
    assert len(run(curve=True).losses) == 8
    assert len(ran) == 2
    assert len(run(curve=True).losses) == 8
    run()
    assert len(ran) == 2
    # Points of the curve are where rows are logged.
    assert [step for step, _ in run(curve=True, log_every=4).accuracies] == [4, 8]
    assert len(ran) == 3


def test_a_curve_of_a_run_that_diverged_is_kept_or_run_for(ran, tmp_path):
    exploding = wine(lr=1e30, activation="relu", steps=8)
    cache = Cache(tmp_path)
    for config, runs, points in (
        (exploding, 1, 0),
        (replace(exploding, curve=True), 2, 1),
        (replace(exploding, curve=True), 2, 1),
        (exploding, 2, 1),
    ):
        (found,) = run_grid([config], cache=cache, processes=1)
        assert found.diverged_step == 2 and found.failed
        assert (len(ran), len(found.losses)) == (runs, points)


def test_a_cache_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write to"):
        run_grid([wine()], cache=Cache(tmp_path / "file"), processes=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "digits"},
        {"optimizer": "adam"},
        {"lr": 0.2},
        {"options": {"momentum": 0.9}},
        {"widths": (5,)},
        {"widths": (4, 4)},
        {"activation": "relu"},
        {"head": "sigmoid"},
        {"validation": 0.2},
        {"batch_size": 16},
        {"epochs": 1},
        {"steps": 4},
        {"seed": 1},
        {"device": "meta"},
    ],
    ids=str,
)
def test_what_decides_a_run_decides_its_key(settings):
    assert key_of(wine(**settings)) != key_of(wine())


def test_times_are_those_of_one_machine(monkeypatch):
    def key(**settings):
        return key_of(wine(**settings))

    timed = key(evaluate_every=0.5)
    assert timed == key(evaluate_every=0.5, threads=1, curve=True, log_every=7)
    assert len({timed, key(), key(evaluate_every=1), key(evaluate_every=0.5, threads=2)}) == 4
    untimed = key()
    monkeypatch.setattr(cache_module, "machine", lambda device: "another")
    assert key(evaluate_every=0.5) != timed
    assert key() == untimed


def test_the_networks_settings_decide_the_key():
    def cnn(**settings):
        return key_of(TrainConfig(network="cnn", optimizer="sgd", **settings))

    keys = [cnn(), cnn(channels=4), cnn(hidden=4), cnn(pools=(1, 2)), key_of(TrainConfig())]
    assert len(set(keys)) == 5
    assert cnn() == cnn(channels=32, hidden=128, pools=(2, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"threads": 2},
        {"log_every": 7},
        {"curve": True},
        {"checkpoint_every": 3},
        {"batch_size": 8},  # the default, in words
        {"activation": "tanh"},
        {"options": {}},
    ],
    ids=str,
)
def test_what_does_not_decide_a_run_is_not_in_its_key(settings, tmp_path):
    assert key_of(wine(**settings)) == key_of(wine())
    assert key_of(wine(output=tmp_path, data_root=tmp_path)) == key_of(wine())


def test_files_are_known_by_their_sizes_wherever_they_are(mnist_root, tmp_path, write_idx):
    import numpy as np

    def key(root):
        return key_of(TrainConfig(dataset="mnist", data_root=root))

    before = key(mnist_root)
    moved = mnist_root.rename(tmp_path / "elsewhere")
    assert key(moved) == before
    other = tmp_path / "other"
    moved.rename(other)
    write_idx(other / "mnist" / "t10k-labels-idx1-ubyte.gz", np.arange(200) % 10)
    assert key(other) != before
    with pytest.raises(InputError, match="mnist is not there"):
        key(tmp_path / "nowhere")


def test_the_code_and_torch_decide_the_key(monkeypatch):
    before = key_of(wine())
    monkeypatch.setattr(cache_module, "code_digest", lambda: "another")
    assert key_of(wine()) != before
    monkeypatch.undo()
    assert key_of(wine()) == before
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert key_of(wine()) != before


def test_code_that_computes_is_all_there():
    root = cache_module.Path(cache_module.ocnopt.__file__).parent
    for part in cache_module._COMPUTING:
        assert list((root / part).rglob("*.py"))
    for name in cache_module._COMPUTING_FILES:
        assert (root / "experiments" / f"{name}.py").is_file()


OWN = """
import torch

def data():
    x = torch.linspace(-1, 1, 40).unsqueeze(1)
    return x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long()

def broken():
    return 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_of_the_grid_{next(_NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


@pytest.mark.parametrize("setting", ["dataset", "network", "optimizer"])
def test_the_users_source_decides_the_key(own, tmp_path, setting):
    def key():
        cache_module._source.cache_clear()
        extra = {} if setting != "network" else {"widths": None}
        return key_of(wine(**{setting: f"{own}:data", **extra}))

    before = key()
    assert key() == before != key_of(wine())
    (tmp_path / f"{own}.py").write_text(OWN + "# another thought\n")
    assert key() != before
    before = key()
    (tmp_path / "what_it_imports.py").write_text("WIDTH = 16\n")
    assert key() != before, "a module may import its neighbours"


@pytest.mark.parametrize("module", ["{}", "{}.net", "{}.parts.net", "{}.parts"])
def test_all_of_a_package_decides_the_key(tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_package_of_the_grid_{next(_NUMBERS)}"
    parts = tmp_path / name / "parts"
    parts.mkdir(parents=True)
    for folder in (parts.parent, parts):
        for file in ("__init__", "net", "other"):
            (folder / f"{file}.py").write_text(OWN)

    def key():
        cache_module._source.cache_clear()
        return key_of(wine(dataset=f"{module.format(name)}:data"))

    seen = [key()]
    for changed in (parts / "other.py", parts.parent / "other.py", parts / "net.py"):
        changed.write_text(OWN + "# another thought\n")
        seen.append(key())
    (tmp_path / "beside.py").write_text(OWN)
    seen.append(key())
    assert len(set(seen[:-1])) == 4
    assert seen[-1] == seen[-2], "what lies beside a package is none of it"


@pytest.mark.parametrize("name", ["nowhere_at_all:f", "nowhere.at.all:f", ":f", ".mine:f"])
def test_a_module_that_is_not_there_has_a_key_and_then_an_error(name, tmp_path):
    config = wine(dataset=name)
    assert key_of(config)
    with pytest.raises(InputError, match=r"cannot be imported|expected module:name"):
        run_grid([config], cache=Cache(tmp_path), processes=1)


def test_own_data_in_a_grid(own, ran):
    found = run_grid([wine(dataset=f"{own}:data", seed=s) for s in (0, 1)], processes=1)
    assert [seeds for *_, seeds in ran] == [(0, 1)]
    assert all(not o.failed for o in found)


# Divergence


def test_divergence_is_an_outcome(tmp_path):
    configs = [wine(lr=lr, activation="relu", seed=s) for lr in (0.1, 1e30) for s in (0, 1)]
    configs.append(wine(optimizer="kfac", lr=1e39))
    outcomes = run_grid(configs, cache=Cache(tmp_path), processes=1)
    assert [o.diverged_step for o in outcomes] == [None, None, 2, 2, 1]
    assert [o.failed for o in outcomes] == [False, False, True, True, True]
    assert [o.steps for o in outcomes] == [3, 3, 2, 2, 1]
    assert run_grid(configs, cache=Cache(tmp_path), processes=1) == outcomes


# Processes


def test_processes_give_the_same_numbers():
    torch.manual_seed(11)  # whatever the caller's is
    one = run_grid(MIXED, processes=1)
    assert timeless(run_grid(MIXED, processes=2)) == timeless(one)


def test_an_input_error_of_a_worker_arrives_as_one(tmp_path):
    good = wine(lr=0.3)
    configs = [good, wine(options={"speed": 3})]
    with pytest.raises(InputError, match="no option 'speed'"):
        run_grid(configs, cache=Cache(tmp_path), processes=2)
    with pytest.raises(InputError, match="no option 'speed'"):
        run_grid(configs, cache=Cache(tmp_path), processes=1)
    assert Cache(tmp_path).get(good.resolved()) is not None


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which joblib is called."""
    calls = []

    class Spy(joblib.Parallel):
        def __init__(self, **options):
            calls.append(options)
            super().__init__(**options)

    monkeypatch.setattr(joblib, "Parallel", Spy)
    return calls


@pytest.mark.parametrize("jobs", [None, 2])
def test_threads_run_one_at_a_time(asked, jobs, monkeypatch):
    """Torch's random state is the process's: threads that shared it would start anywhere."""
    at_once, most, run = [], [], grid._run

    def spy(job):
        at_once.append(job)
        most.append(len(at_once))
        try:
            return run(job)
        finally:
            at_once.pop()

    expected = timeless(run_grid(MIXED, processes=1))
    monkeypatch.setattr(grid, "_run", spy)
    with joblib.parallel_config(backend="threading", n_jobs=jobs):
        assert timeless(run_grid(MIXED)) == expected
    assert set(most) == {1}
    assert len(asked) == 1
    assert asked[0]["return_as"] == "generator_unordered"


def test_the_sequential_backend_works_in_rounds(asked, ran):
    expected = timeless(run_grid(MIXED, processes=1))
    many = [wine(lr=0.1 * i) for i in range(1, 10)]
    with joblib.parallel_config(backend="sequential"):
        assert timeless(run_grid(MIXED)) == expected
        del asked[:]
        run_grid(many)
    assert len(asked) == 3  # nine jobs, four at a time
    assert all("return_as" not in options for options in asked)


class _Whole(parallel.ThreadingBackend):
    """A backend that hands its results over all at once, as older ones of clusters do."""

    supports_return_generator = False


def test_a_backend_without_generators_works_in_rounds(asked, monkeypatch, tmp_path):
    monkeypatch.setitem(parallel.BACKENDS, "whole", _Whole)
    monkeypatch.setattr(grid, "_ROUND", 1)
    expected = timeless(run_grid(MIXED, processes=1))
    with joblib.parallel_config(backend="whole", n_jobs=2):
        assert timeless(run_grid(MIXED)) == expected
        assert len(asked) == 2  # three jobs, two at a time
        with pytest.raises(KeyboardInterrupt):
            run_grid(MIXED, cache=Cache(tmp_path), watcher=Told(1))
    assert len(list(tmp_path.rglob("*.json"))) >= 3  # the first round's first job, whole


@pytest.mark.parametrize(
    ("inside", "processes", "jobs"),
    [
        ({}, None, -1),  # one per core, where nobody has said anything
        ({"backend": "threading"}, None, -1),
        ({"backend": "threading", "n_jobs": 1}, None, None),
        ({"backend": "threading", "n_jobs": 2}, None, None),
        ({"backend": "threading", "n_jobs": 2}, 3, 3),
    ],
    ids=str,
)
def test_who_says_how_many_workers_there_are(monkeypatch, inside, processes, jobs):
    given = {}

    class Fake:
        def __init__(self, **options):
            given.update(options)

        def __call__(self, tasks):
            return (function(*args) for function, args, _ in tasks)

    monkeypatch.setattr(joblib, "Parallel", Fake)
    with joblib.parallel_config(**inside):
        run_grid([wine(), wine(lr=0.2)], processes=processes)
    assert given["n_jobs"] == jobs


def test_workers_have_one_thread_each_unless_told(monkeypatch):
    seen = []
    monkeypatch.setattr(grid, "_run", lambda job: seen.append(job.config.threads) or [None])
    with joblib.parallel_config(backend="sequential"):
        run_grid(
            [TrainConfig(network="cnn", threads=n, optimizer="sgd") for n in (None, 2)],
            together=False,
        )
    assert seen == [1, 2]


def test_without_joblib_there_is_a_hint(monkeypatch):
    find = grid.importlib.util.find_spec
    monkeypatch.setattr(
        grid.importlib.util, "find_spec", lambda name: None if name == "joblib" else find(name)
    )
    assert len(run_grid([wine()])) == 1  # one needs none
    with pytest.raises(InputError, match="pip install"):
        run_grid([wine(), wine(lr=0.2)])


def test_together_is_what_trains_a_group(monkeypatch):
    seen = []
    train = together.train_together
    monkeypatch.setattr(
        together, "train_together", lambda c, seeds: seen.append(seeds) or train(c, seeds)
    )
    run_grid([wine(seed=s) for s in (4, 5)], processes=1)
    assert seen == [(4, 5)]
