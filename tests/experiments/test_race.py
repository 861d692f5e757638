"""Races: what is read off curves, the rules, the words, the picture, and one whole race."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from ocnopt.experiments import grid
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.race import Lane, save_race
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.race import Contender, Paper, Race, run_race
from ocnopt.experiments.race.analysis import (
    NEVER,
    accuracy_at,
    area,
    curve_of,
    median_ratio,
    time_to_target,
)
from ocnopt.experiments.race.page import markdown_page, short_table
from ocnopt.experiments.race.result import Result
from ocnopt.experiments.race.tune import Trial, Tuned, choose, tune
from ocnopt.experiments.race.words import number, percent, remarks, sentence
from ocnopt.experiments.reproduce import EXPERIMENTS, Experiment, runner
from ocnopt.experiments.reproduce.report import Settings
from ocnopt.experiments.tuning import TUNING_SEED
from ocnopt.experiments.watcher import Watcher

# Curves


WHEN = (0.0, 1.0, 2.0, 4.0)
SEEN = (0.1, 0.6, 0.5, 0.8)


@pytest.mark.parametrize(
    ("target", "time"),
    [
        (0.05, 0.0),  # before the first step
        (0.6, 1.0),  # reached exactly, though lost again
        (0.35, 1.0),  # halfway to it: not 0.5
        (0.61, 4.0),
        (0.8, 4.0),
        (6 * 0.1, 1.0),  # 0.6000000000000001: the same share of samples
        (0.81, NEVER),
    ],
)
def test_a_target_is_reached_at_the_first_evaluation_at_or_above_it(target, time):
    assert time_to_target(WHEN, SEEN, target) == time


def test_without_evaluations_no_target_is_reached():
    assert time_to_target((), (), 0.0) == NEVER


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(0, 100))
def test_no_target_is_reached_before_a_line_between_evaluations_reaches_it(seen, target):
    """The rule is the stricter of the two that are in use: by less than one evaluation."""
    own = time_to_target(range(len(seen)), [s / 100 for s in seen], target / 100)
    crossed = NEVER
    for i, accuracy in enumerate(seen):
        if accuracy >= target:
            before = seen[i - 1]
            crossed = float(i) if not i else i - 1 + (target - before) / (accuracy - before)
            break
    assert own == crossed == NEVER or 0 <= own - crossed < 1


@pytest.mark.parametrize(
    ("time", "accuracy"),
    [(-1, None), (0, 0.1), (0.99, 0.1), (1, 0.6), (3.9, 0.5), (4, 0.8), (4.1, None)],
)
def test_the_accuracy_at_a_time_is_that_of_the_last_evaluation_until_then(time, accuracy):
    assert accuracy_at(WHEN, SEEN, time) == accuracy


def test_a_run_without_evaluations_has_no_accuracy():
    assert accuracy_at((), (), 1.0) is None


def test_area_is_the_mean_height():
    assert area((0, 1, 3), (0.0, 1.0, 0.5)) == pytest.approx((0.5 + 2 * 0.75) / 3)
    assert area((5, 7), (0.3, 0.3)) == pytest.approx(0.3)
    assert area((2,), (0.9,)) == area((), ()) == 0


def test_ratios_are_those_of_medians_and_never_counts_as_late():
    assert median_ratio([1.0, 2.0, 9.0], [4.0, 4.0, 5.0]) == 0.5
    assert median_ratio([1.0, 2.0, NEVER], [4.0, NEVER, 1.0]) == 0.5
    assert median_ratio([1.0, NEVER, NEVER], [4.0]) is None
    assert median_ratio([1.0, NEVER], [4.0]) is None  # half of the seeds are no majority
    assert median_ratio([1.0], [NEVER]) is None
    assert median_ratio([], [1.0]) is None
    assert median_ratio([1.0], [0.0]) is None


# Runs that are made up: four steps an epoch, an evaluation every two steps, 0.1 s a step.


def run(accuracies, seed=0, per_step=0.1, loss=0.5, diverged=None):
    steps = [2 * i for i in range(len(accuracies))]
    return Outcome(
        seed=seed,
        train_loss=None if diverged else loss,
        test_accuracy=accuracies[-1],  # of a run that diverged, too: it may have been good before
        diverged_step=diverged,
        steps=diverged or steps[-1],
        seconds_per_step=per_step,
        losses=((1, 1.0),),
        accuracies=tuple(zip(steps, accuracies, strict=True)),
        clock=tuple((step, step * per_step, 2 * step * per_step) for step in steps),
    )


def test_a_curve_has_the_seconds_that_count():
    found = curve_of(run([0.1, 0.4, 0.6]), 4, cpu=True)
    assert found.epochs == (0.0, 0.5, 1.0)
    assert found.seconds == pytest.approx((0.0, 0.2, 0.4))
    assert found.accuracies == (0.1, 0.4, 0.6)
    assert curve_of(run([0.1, 0.4, 0.6]), 4, cpu=False).seconds == pytest.approx((0.0, 0.4, 0.8))


def contender(label, lrs=(0.1, 0.2), **more):
    return Contender(label, label, lrs, **more)


def race(*contenders, **settings):
    usual = (contender("adam"), contender("sgd"))
    base = TrainConfig(widths=(8,), epochs=2, batch_size=64)
    return Race(**{"title": "T", "base": base, "contenders": contenders or usual, **settings})


def result(runs, edge=False, **settings):
    """A race whose final runs are given, by label."""
    labels = list(runs)
    plan = race(
        *(contender(label, (0.1, 0.2, 0.3)) for label in labels),
        **{"seeds": max(map(len, runs.values())), **settings},
    )
    tuned = []
    for c in plan.contenders:
        trials = tuple(Trial(config, (run([0.1, 0.5]),)) for config in c.configs(plan.tuning))
        tuned.append(Tuned(c, trials, trials[2 if edge else 1] if runs[c.label] else None))
    return Result.of(plan, tuned, [tuple(runs[label]) for label in labels], 4, "a machine")


ADAM = [run([0.1, 0.5, 0.9], 0), run([0.1, 0.6, 0.8], 1), run([0.1, 0.7, 0.85], 2)]
FAST = [run([0.1, 0.86, 0.95], s, per_step=0.2) for s in range(3)]


def test_targets_are_shares_of_the_baselines_final_mean():
    found = result({"adam": ADAM, "sgd": FAST})
    assert found.targets == pytest.approx({0.9: 0.765, 0.95: 0.8075, 0.98: 0.833, 1.0: 0.85})
    assert result({"adam": FAST, "sgd": ADAM}).targets[1.0] == pytest.approx(0.95)


def test_times_to_targets_by_seed_and_their_ratio():
    found = result({"adam": ADAM, "sgd": FAST})
    adam, sgd = found.entries
    assert adam.seconds_to(found.targets[0.98]) == pytest.approx([0.4, NEVER, 0.4])
    assert adam.epochs_to(found.targets[0.98]) == [1.0, NEVER, 1.0]
    assert sgd.seconds_to(found.targets[0.98]) == pytest.approx([0.4] * 3)
    assert found.ratio(sgd, found.targets[0.98]) == pytest.approx(1.0)
    assert found.ratio_of_epochs(sgd, found.targets[0.98]) == 0.5
    assert found.ratio_of_steps(sgd) == pytest.approx(2.0)
    assert found.ratio(sgd, 0.99) is None


def test_equal_epochs_and_equal_time_are_on_evaluations():
    found = result({"adam": ADAM, "sgd": FAST})
    adam, sgd = found.entries
    # A quarter of the one epoch lies before the first evaluation after a step.
    assert found.epochs == [0.5, 1.0]
    assert adam.at_epoch(0.5) == [0.5, 0.6, 0.7]
    # The shortest run is adam's, of 0.4 s: sgd has had one evaluation by then.
    assert found.seconds == pytest.approx([0.1, 0.2, 0.4])
    assert adam.at_second(0.4) == [0.9, 0.8, 0.85]
    assert sgd.at_second(0.4) == [0.86] * 3
    assert sgd.at_second(0.39) == [0.1] * 3


def test_a_run_that_diverged_is_counted_and_not_averaged():
    broken = [*FAST[:2], run([0.1, 0.86], 2, per_step=0.01, diverged=3)]
    found = result({"adam": ADAM, "sgd": broken})
    sgd = found.entries[1]
    assert sgd.failed == 1
    assert sgd.accuracies == [0.95, 0.95] and sgd.losses == [0.5, 0.5]
    assert len(sgd.at_epoch(0.5)) == 3 and len(sgd.at_epoch(1.0)) == 2
    # It ended after 0.02 s, which is not the time of a run.
    assert found.seconds[-1] == pytest.approx(0.4)
    # It has been at 83 %, but never at 90 %.
    assert all(map(math.isfinite, sgd.seconds_to(0.83)))
    assert sgd.seconds_to(0.9)[2] == NEVER
    page = markdown_page(Settings("x", None), found)
    assert "95.0 ± 0.0 (2 of 3)" in page
    assert "sgd: 1 of 3 final runs diverged, at step 3" in page
    assert "(1 of 3 runs diverged)" in found_sentence(found)


def test_seeds_are_compared_where_neither_diverged():
    """The one that did would make the difference vanish."""
    adam = [*ADAM[:2], run([0.1, 0.99], 2, diverged=3)]
    better = [run([0.1, 0.95], 0), run([0.1, 0.85], 1), run([0.1, 0.9], 2)]
    text = found_sentence(result({"adam": adam, "sgd": better}))
    assert "above adam beyond the spread" in text
    # One seed is left of each pair.
    others = [run([0.1, 0.9], s, diverged=3 if s < 2 else None) for s in range(3)]
    assert "on too few seeds to tell" in found_sentence(result({"adam": ADAM, "sgd": others}))


def test_nothing_is_left_to_compare_where_all_diverged():
    broken = [run([0.1, 0.5], s, diverged=3) for s in range(3)]
    found = result({"adam": broken, "sgd": broken})
    assert found.seconds == [] and found.targets == {}
    page = markdown_page(Settings("x", None), found)
    assert "Accuracy at equal time" not in page and "none, as it diverged" in page


def found_sentence(found):
    text = sentence(found)
    assert text.endswith(".") and "\n" not in text
    return text


# Words


def test_the_sentence_says_who_was_faster_and_who_was_better():
    text = found_sentence(result({"adam": ADAM, "sgd": FAST}))
    assert text.startswith(
        "To 98 % of adam's final accuracy (83.3 %), sgd took 1.00 times adam's CPU seconds and 0.50"
        " times its epochs."
    )
    assert "sgd 95.0 ± 0.0 %, above adam beyond the spread (adam: 85.0 ± 5.0 %)" in text
    slow = [run([0.1, 0.2, 0.3], s) for s in range(3)]
    text = found_sentence(result({"adam": ADAM, "sgd": slow}))
    assert "sgd got there on none of 3 seeds" in text
    assert "sgd 30.0 ± 0.0 %, below adam beyond the spread" in text
    mixed = [slow[0], slow[1], replace(FAST[2])]
    text = found_sentence(result({"adam": ADAM, "sgd": mixed}))
    assert "sgd got there on 1 of 3 seeds." in text
    assert "no different from adam beyond the spread" in text
    text = found_sentence(result({"adam": ADAM, "sgd": [FAST[0], FAST[1], slow[2]]}))
    assert "0.50 times its epochs (never on 1 of 3 seeds)" in text


def test_the_sentence_where_the_baseline_misses_its_own_target():
    uneven = [run([0.1, 0.9], 0), run([0.1, 0.5], 1), run([0.1, 0.5], 2)]
    text = found_sentence(result({"adam": uneven, "sgd": FAST}))
    assert "adam got there on 1 of 3 seeds; sgd took 0.4 CPU seconds" in text


def test_the_sentence_without_targets():
    broken = [run([0.1], s, diverged=1) for s in range(3)]
    for runs, says in ((broken, "on every seed"), ([], "at every setting")):
        found = result({"adam": runs, "sgd": FAST})
        text = found_sentence(found)
        assert f"adam diverged {says}, so that there are no targets" in text
        assert "sgd 95.0 ± 0.0 %" in text
        page = markdown_page(Settings("x", None), found)
        assert "Time to common targets" not in page
        assert "| adam | - |" in page or "| adam | lr 0.2 | - (0 of 3) |" in page


def test_a_contender_that_could_not_start_is_named():
    found = result({"adam": ADAM, "sgd": []})
    assert "sgd did not start, as it diverged at every setting" in found_sentence(found)
    assert remarks(found)[0].startswith("sgd: every candidate diverged")
    assert short_table(found)[1][1] == ["sgd", "-", "-", "-", "-", "-"]


def test_one_contender_runs_against_its_own_targets():
    text = found_sentence(result({"adam": ADAM}))
    assert "adam took 0.4 CPU seconds (never on 1 of 3 seeds)" in text


def test_what_to_beware_of():
    found = result({"adam": ADAM, "sgd": [*FAST[:2], run([0.1, 0.9], 2, per_step=0.15)]})
    assert remarks(found) == [
        "The wall clock went on for at most 2.00 times the CPU seconds of a run, and the seconds of"
        " a step differed between seeds of a contender by a factor of at most 1.33: the more, the"
        " busier the machine was with other work."
    ]
    edges = remarks(result({"adam": ADAM[:1], "sgd": FAST[:1]}, edge=True))
    assert edges[0] == (
        "adam: its learning rate, 0.3, is the greatest that was tried; greater ones may be better."
    )
    assert edges[1].startswith("sgd: ")
    assert edges[2].startswith("One seed has no spread")
    assert "of a run: the more" in edges[3]


def test_on_a_gpu_the_wall_clock_counts():
    base = TrainConfig(widths=(8,), epochs=2, device="cuda")
    found = result({"adam": ADAM, "sgd": FAST}, base=base)
    assert found.clock == "seconds" and found.busiest is None
    assert found.seconds[-1] == pytest.approx(0.8)
    assert "in wall-clock seconds, as CPU seconds say nothing" in markdown_page(
        Settings("x", None), found
    )


def test_never_is_written_down():
    slow = [run([0.1, 0.2, 0.3], s) for s in range(3)]
    page = markdown_page(Settings("x", None), result({"adam": ADAM, "sgd": slow}))
    row = next(line for line in page.splitlines() if line.startswith("| sgd | never"))
    assert row == "| sgd | never on 3 of 3 | never on 3 of 3 | never on 3 of 3 | never on 3 of 3 |"
    assert "| adam | 0.4 (1.00x) | 0.4 (1.00x), never on 1 of 3 |" in page


def test_the_papers_figures_stand_beside_ours():
    paper = Paper("a figure.", {"adam": 77.3}, {60: {"adam": 158, "sgd": 284}, 99: {"sgd": 1000.0}})
    found = result({"adam": ADAM, "sgd": FAST}, paper=paper, claim="sgd wins.")
    page = markdown_page(Settings("x", None), found)
    assert "**The paper says:** sgd wins." in page
    assert "| final test accuracy (%) | 85.0 ± 5.0 (77.3) | 95.0 ± 0.0 |" in page
    assert "| seconds to 60 % | 0.2 (158) | 0.4 (284) |" in page
    assert "| relative to adam | 1.00 (1.00) | 2.00 (1.80) |" in page
    assert "| seconds to 99 % | never on 3 of 3 | never on 3 of 3 (1,000) |" in page
    assert "| relative to adam | - | - |" in page


def test_numbers_are_readable():
    assert [number(x) for x in (0.012345, 4.5, 123.4, 999.6, 12345.6)] == [
        *("0.0123", "4.5", "123"),
        *("1,000", "12,346"),
    ]
    assert percent([]) == "-" and percent([0.5]) == "50.0" and percent([0.4, 0.6]) == "50.0 ± 14.1"


# Contenders and rules


def test_candidates_are_every_rate_with_every_value():
    found = contender("sgd", options={"nesterov": False}, also={"momentum": (0.0, 0.9)})
    base = TrainConfig(optimizer="adam", seed=3)
    assert found.candidates == 4
    configs = found.configs(base)
    assert [(c.optimizer, c.lr, dict(c.options)) for c in configs] == [
        ("sgd", lr, {"nesterov": False, "momentum": m}) for lr in (0.1, 0.2) for m in (0.0, 0.9)
    ]
    assert all(c.seed == 3 for c in configs)
    assert found.setting(configs[1]) == "lr 0.1, momentum 0.9"
    assert contender("sgd").candidates == 2
    assert contender("sgd").setting(configs[1]) == "lr 0.1"


def test_edges_of_what_was_tried():
    found = contender("sgd", (0.1, 0.2, 0.3), also={"momentum": (0.0, 0.5, 0.9)})
    at = {(c.lr, c.options["momentum"]): c for c in found.configs(TrainConfig())}
    assert found.edges(at[0.2, 0.5]) == {}
    assert found.edges(at[0.1, 0.9]) == {"lr": "least", "momentum": "greatest"}
    assert found.edges(at[0.3, 0.0]) == {"lr": "greatest"}  # nothing is below no momentum
    one = contender(
        "sgd",
        (0.1,),
        also={
            "kind": ("a", "b"),
        },
    )
    assert one.edges(one.configs(TrainConfig())[0]) == {}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lrs": ()}, "learning rates must be"),
        ({"also": {"a": (1,), "b": (2,)}}, "only one more option"),
        ({"also": {"a": ()}}, "a needs values"),
        ({"also": {"a": (1, 2, 1)}}, "each once"),
        ({"also": {"a": (1,)}, "options": {"a": 1}}, "a is fixed"),
    ],
)
def test_contenders_that_cannot_be(more, says):
    with pytest.raises(InputError, match=says):
        contender("sgd", **more)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"contenders": ()}, "1 to 8 contenders, not 0"),
        ({"contenders": (contender("adam"),) * 2}, "labels of their own"),
        ({"contenders": (contender("adam"), contender("sgd", (1.0,)))}, "adam 2, sgd 1"),
        ({"baseline": "ekfac"}, "'ekfac' is none of adam, sgd"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"tuning_seeds": 0}, "tuning_seeds must be at least 1"),
        ({"validation": 0.0}, "validation"),
        ({"targets": (0.9, 0.8)}, "ascending"),
        ({"targets": (0.9, 1.1)}, "ascending shares"),
        ({"headline": 0.5}, "headline"),
        ({"paper": Paper("", {"snopt": 1.0})}, "name snopt, which is none of adam, sgd"),
        ({"paper": Paper("", {}, {60: {"snopt": 1.0}})}, "snopt"),
    ],
)
def test_races_that_cannot_be(settings, says):
    with pytest.raises(InputError, match=says):
        race(**settings)


def test_final_runs_and_tuning_differ_in_data_and_length_alone():
    base = TrainConfig(optimizer="ekfac", lr=3.0, options={"damping": 1.0}, seed=4, threads=2)
    plan = race(base=replace(base, epochs=5, curve=True), tuning_epochs=2, validation=0.2)
    final, tuning = plan.final, plan.tuning
    assert (final.validation, final.epochs, tuning.validation, tuning.epochs) == (0.0, 5, 0.2, 2)
    assert replace(tuning, validation=0.0, epochs=5) == final
    assert (final.threads, final.evaluate_every, final.curve) == (1, 0.25, False)
    assert final.options == {}
    assert replace(plan, tuning_epochs=None).tuning.epochs == 5
    # Few steps are no end to a tuning of so many epochs.
    assert replace(plan, base=replace(base, steps=9)).tuning.steps is None
    assert replace(plan, base=replace(base, steps=9), tuning_epochs=None).tuning.steps == 9


def trial(*outcomes, lr=0.1):
    return Trial(TrainConfig(optimizer="sgd", lr=lr), outcomes)


def test_the_choice_has_the_best_accuracy_then_the_greatest_area_then_is_the_first():
    low, late = trial(run([0.1, 0.9, 0.7])), trial(run([0.1, 0.2, 0.8]))
    early, again = trial(run([0.1, 0.7, 0.8])), trial(run([0.1, 0.7, 0.8]))
    assert choose([low, late]) is late
    assert choose([late, early, again]) is early
    assert early.area == pytest.approx((0.4 + 0.75) / 2)
    broken = trial(run([0.1, 0.99], diverged=3))
    assert (broken.accuracy, broken.area, broken.failed) == (0.0, 0.0, 1)
    assert choose([broken, low]) is low
    # Half of the runs of one that diverges are worth half.
    half = trial(run([0.1, 0.2, 0.9]), run([0.1], diverged=1))
    assert half.accuracy == 0.45
    assert choose([half, low]) is low
    assert choose([broken, half]) is half
    assert choose([broken, broken]) is None


def test_candidates_share_seeds_data_and_length(monkeypatch):
    asked = []

    def run_grid(configs, **_):
        asked.extend(configs)
        return [run([0.1, c.lr], c.seed) for c in configs]

    monkeypatch.setattr("ocnopt.experiments.race.tune.run_grid", run_grid)
    found = tune(race(tuning_seeds=2), cache=None, processes=1, watcher=Watcher())
    assert [c.seed for c in asked] == [TUNING_SEED, TUNING_SEED + 1] * 4
    own = {"optimizer", "options", "lr", "seed"}
    shared = [{k: v for k, v in c.to_json().items() if k not in own} for c in asked]
    assert all(s == shared[0] for s in shared)
    assert shared[0]["validation"] == 0.1
    assert [t.contender.label for t in found] == ["adam", "sgd"]
    assert all(t.chosen.config.lr == 0.2 and t.edges == {"lr": "greatest"} for t in found)
    assert [o.test_accuracy for t in found[1].trials for o in t.outcomes] == [0.1, 0.1, 0.2, 0.2]


# Picture


def lane(name="adam", accuracy=((10.0, 60.0, 90.0), (10.0, 80.0))):
    epochs = [[0.5 * i for i in range(len(run))] for run in accuracy]
    seconds = [[(1 + k) * i for i in range(len(run))] for k, run in enumerate(accuracy)]
    return Lane(name, epochs, seconds, accuracy)


def test_the_picture_shows_means_bands_ends_and_targets(tmp_path, drawn):
    path = tmp_path / "r.png"
    save_race(path, "t", [lane(), lane("sgd", ((10.0, 20.0, 30.0),))], {"x": 80.0, "y": 88.0}, "s")
    left, right = drawn[0].axes
    curve = next(line for line in left.lines if line.get_label() == "adam")
    assert curve.get_ydata() == pytest.approx([10.0, 70.0, 90.0])
    assert curve.get_xdata() == pytest.approx([0.0, 1.5, 2.0])
    assert next(line for line in right.lines if line.get_label() == "adam").get_xdata()[1] == 0.5
    band = left.collections[0].get_paths()[0].vertices
    assert {60.0, 80.0} <= set(band[:, 1].tolist())
    crosses = [line for line in left.lines if line.get_marker() == "x"]
    assert [(c.get_xdata()[0], c.get_ydata()[0]) for c in crosses] == [(2.0, 80.0)]
    for ax in (left, right):
        across = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
        assert [line.get_ydata()[0] for line in across] == [80.0, 88.0]
    assert [text.get_text() for text in right.texts] == ["x", "y"]
    low, high = left.get_ylim()
    assert low < 30.0 < 90.0 < high  # what stays low is seen, too
    assert (left.get_xlabel(), right.get_xlabel()) == ("s of training", "epochs")
    assert imread(path).shape[1] == 1200


def test_names_of_near_targets_do_not_cover_each_other(tmp_path, drawn):
    save_race(tmp_path / "r.png", "t", [lane()], {"a": 80.0, "b": 80.1, "c": 80.2}, "s")
    heights = [text.xy[1] for text in drawn[0].axes[1].texts]
    low, high = drawn[0].axes[1].get_ylim()
    assert all(b - a >= 0.04 * (high - low) for a, b in pairwise(heights))


def test_pictures_without_targets_or_runs(tmp_path):
    save_race(tmp_path / "a.png", "t", [lane()], {}, "s")
    save_race(tmp_path / "b.png", "t", [], {}, "s")
    assert (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("lanes", "says"),
    [
        ([lane(str(i)) for i in range(9)], "up to 8 methods, not 9"),
        ([replace(lane(), seconds=((0.0, 1.0), (0.0, 1.0)))], "not of the same runs"),
    ],
)
def test_pictures_that_cannot_be(tmp_path, lanes, says):
    with pytest.raises(InputError, match=says):
        save_race(tmp_path / "r.png", "t", lanes, {}, "s")


# The whole


DIGITS = TrainConfig(dataset="digits", widths=(16,), activation="relu", batch_size=64, epochs=2)
TINY = Race(
    title="A small race",
    base=DIGITS,
    contenders=(
        Contender("adam", "adam", (1e-3, 1e-2)),
        Contender("sgd", "sgd", (0.1,), also={"momentum": (0.0, 0.9)}),
        Contender("ekfac", "ekfac", (0.03, 1e30)),
        Contender("wild", "sgd", (1e30, 1e31)),
    ),
    seeds=2,
    evaluate_every=0.5,
    notes=("It is small.",),
)


def tiny(settings, watcher):
    return run_race(settings, TINY, watcher)


def test_a_race_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", Experiment(__name__, "tiny", "a race"))
    ran = []
    alone = grid._train_alone
    monkeypatch.setattr(grid, "_train_alone", lambda config: ran.append(config) or alone(config))
    settings = Settings("tiny", tmp_path, cache=tmp_path / "cache", processes=1)

    class Until(Watcher):
        parts, total, until = 0, 0, 10

        def start(self, total):
            self.total = total

        def advance(self, text=""):
            self.parts += 1
            if self.parts == self.until:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.reproduce(settings, Until())
    assert len(ran) == 10
    whole = Until()
    whole.until = None
    report = runner.reproduce(settings, whole)
    # Eight candidates, and two seeds of the three that can be chosen.
    assert len(ran) == 14 and whole.parts == 14
    assert all(c.threads == 1 for c in ran)

    page = (tmp_path / "tiny.md").read_text()
    assert report.sentence in page and "- It is small." in page
    assert "wild: every candidate diverged" in page
    assert "| ekfac | lr 1e+30 | - | 0.00 | 1 of 1, at step" in page
    assert all(len(row) == len(report.columns) for row in report.table)
    assert (tmp_path / "tiny.png").stat().st_size > 10_000

    kept = json.loads((tmp_path / "tiny.json").read_text())
    rows = {kind: [r for r in kept["rows"] if r["kind"] == kind] for kind in ("tuning", "final")}
    assert len(rows["tuning"]) == 8 and sum(r["chosen"] for r in rows["tuning"]) == 3
    assert [(r["contender"], r["seed"]) for r in rows["final"]] == [
        (label, seed) for label in ("adam", "sgd", "ekfac") for seed in (0, 1)
    ]
    for row in rows["final"]:
        curve = row["curve"]
        # 22 steps an epoch: half and whole ones, from before the first step on.
        assert curve["step"] == [0, 11, 22, 33, 44]
        for seconds in (curve["cpu_seconds"], curve["wall_seconds"]):
            assert seconds[0] == 0 and sorted(set(seconds)) == seconds
        assert curve["test_accuracy"][-1] == row["test_accuracy"]
    adam = [r for r in rows["final"] if r["contender"] == "adam"]
    final = fmean(r["test_accuracy"] for r in adam)
    assert kept["targets"]["0.9"] == pytest.approx(0.9 * final)
    (own,) = [r for r in kept["rows"] if r["kind"] == "summary" and r["contender"] == "adam"]
    for seconds, row in zip(own["seconds_to"]["0.9"], adam, strict=True):
        curve = row["curve"]
        reached = [
            time
            for time, accuracy in zip(curve["cpu_seconds"], curve["test_accuracy"], strict=True)
            if accuracy >= 0.9 * final - 1e-9
        ]
        assert seconds == (reached[0] if reached else None)
    assert own["ratio_to_baseline"]["0.9"] in (1.0, None)

    ran.clear()
    again = runner.reproduce(settings)
    assert not ran and again.page == report.page


def test_a_setting_that_cannot_be_is_found_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_train_alone", None)
    wrong = Contender("sgd", "sgd", (0.1, 0.2), {"colour": 1})
    plan = replace(TINY, contenders=(TINY.contenders[0], wrong))
    with pytest.raises(InputError, match="sgd: sgd has no option 'colour'"):
        run_race(Settings("tiny", tmp_path), plan, Watcher())


def test_seeds_of_the_command_count(tmp_path, monkeypatch):
    asked = []

    def run_grid(configs, **_):
        asked.append(list(configs))
        return [run([0.1, 0.5], c.seed) for c in configs]

    monkeypatch.setattr("ocnopt.experiments.race.run.run_grid", run_grid)
    monkeypatch.setattr("ocnopt.experiments.race.tune.run_grid", run_grid)
    plan = replace(TINY, contenders=TINY.contenders[:2])
    run_race(Settings("tiny", tmp_path, seeds=3), plan, Watcher())
    # Seed by seed, so that all contenders have the same share in what disturbs the machine.
    assert [(c.optimizer, c.seed) for c in asked[1]] == [
        (name, seed) for seed in range(3) for name in ("adam", "sgd")
    ]
    assert all(c.validation == 0 for c in asked[1])
