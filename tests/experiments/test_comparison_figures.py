"""Heat maps of differences, learning-rate sweeps and training curves: what is on the picture."""

import math
from dataclasses import replace

import pytest
from matplotlib.image import imread

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.heatmap import Differences, save_differences
from ocnopt.experiments.figures.sensitivity import (
    MOST,
    Course,
    Sweep,
    Training,
    save_sensitivity,
    save_training,
)

NAN = math.nan


def differences(loss=((-0.2, 0.1), (0.05, NAN)), accuracy=((-2.0, 1.0), (0.4, NAN)), notes=None):
    return Differences("DDPNOpt vs SGD", (0.1, 0.2), (1e-5, 1e-3), "reg", loss, accuracy, notes)


def pixel(figure, path, ax, column, row):
    """The colour of a cell, left of its text."""
    image = imread(path)
    x, y = ax.transData.transform((column - 0.42, row - 0.4))
    height = figure.bbox.height
    scale = image.shape[0] / height
    return image[round((height - y) * scale) - 1, round(x * scale)][:3]


def test_cells_are_blue_where_the_loss_falls_and_where_the_accuracy_rises(tmp_path, drawn):
    path = tmp_path / "h.png"
    save_differences(path, [differences(accuracy=((2.0, -1.0), (0.4, NAN)))])
    (figure,) = drawn
    loss, accuracy = figure.axes[:2]
    for ax in (loss, accuracy):
        for column, better in ((0, True), (1, False)):
            red, _, blue = pixel(figure, path, ax, column, 0)
            assert (blue > red + 0.2) == better and (red > blue + 0.1) != better
    worse = pixel(figure, path, loss, 0, 1)
    assert worse[0] > worse[2]  # +0.05 of the loss is red, +0.4 of the accuracy blue
    small = pixel(figure, path, accuracy, 0, 1)
    assert small[2] > small[0]
    failed = pixel(figure, path, loss, 1, 1)
    assert max(failed) - min(failed) < 0.02 and max(failed) < 0.95


def test_limits_are_symmetric_and_values_are_printed(tmp_path, drawn):
    notes = (("", ""), ("", "SGD failed"))
    save_differences(tmp_path / "h.png", [differences(notes=notes)] * 2)
    loss, accuracy = drawn[0].axes[:2]
    assert loss.images[0].get_clim() == (-0.2, 0.2)
    assert accuracy.images[0].get_clim() == (-2.0, 2.0)
    texts = [text.get_text() for text in loss.texts]
    assert texts == ["-0.200", "+0.100", "+0.050", "\u00d7", "SGD failed"]
    assert [label.get_text() for label in loss.get_yticklabels()] == ["0.1", "0.2"]
    assert loss.get_ylim() == (1.5, -0.5)  # the first row is on top


@pytest.mark.parametrize("value", [0.0, NAN])
def test_grids_without_a_difference_can_be_drawn(tmp_path, value):
    grid = ((value, value), (value, value))
    save_differences(tmp_path / "h.png", [differences(grid, grid)])


@pytest.mark.parametrize(
    ("panels", "says"),
    [
        ([], "no comparison"),
        ([differences(loss=((1.0, 2.0),))], "loss must have 2 rows of 2"),
        ([differences(accuracy=((1.0,), (2.0,)))], "accuracy must have 2 rows of 2"),
        ([differences(notes=(("",), ("",)))], "notes must have"),
        ([replace(differences(), columns=())], "0 columns"),
    ],
)
def test_grids_that_do_not_fit(tmp_path, panels, says):
    with pytest.raises(InputError, match=says):
        save_differences(tmp_path / "h.png", panels)
    assert list(tmp_path.iterdir()) == []


def sweep(name="DDPNOpt", workable=(0.01, 0.1)):
    accuracy = ((80.0, 82.0), (90.0, NAN), (NAN, NAN))
    return Sweep(name, (0.01, 0.1, 1.0), accuracy, ((0.4, 0.2), (0.1, NAN), (NAN, NAN)), workable)


def test_sweeps_show_means_bands_ranges_and_failures(tmp_path, drawn):
    save_sensitivity(tmp_path / "s.png", "t", [sweep(), sweep("SGD", None)])
    figure = drawn[0]
    top, strip, right, _ = figure.axes
    assert top.lines[0].get_ydata()[:2] == pytest.approx([81.0, 90.0])
    assert math.isnan(top.lines[0].get_ydata()[2])
    assert right.lines[0].get_ydata()[0] == pytest.approx(0.3)
    assert right.get_yscale() == "log" and top.get_xscale() == "log"
    band = top.collections[0].get_paths()[0].vertices
    assert {80.0, 82.0} <= set(band[:, 1].tolist())
    crosses = [line for line in strip.lines if line.get_marker() == "x"]
    where = [(float(c.get_xdata()[0]), int(c.get_ydata()[0]), c.get_alpha()) for c in crosses]
    some, every = where[0][2], where[1][2]
    assert some < every == 1.0
    assert where == [(0.1, 0, some), (1.0, 0, 1.0), (0.1, 1, some), (1.0, 1, 1.0)]
    bars = [line for line in strip.lines if line.get_marker() == "None"]
    assert [(list(bar.get_xdata()), list(bar.get_ydata())) for bar in bars] == [
        ([0.01, 0.1], [0, 0])
    ]
    assert not strip.get_yticklabels()  # the legend, in the same order, names its rows


def test_eight_methods_are_told_apart_without_colour(tmp_path, drawn):
    save_sensitivity(tmp_path / "s.png", "t", [sweep(f"m{i}") for i in range(MOST)])
    lines = drawn[0].axes[0].lines
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == MOST == 8
    assert len({line.get_marker() for line in lines}) == MOST
    assert len({line.get_color() for line in lines}) == MOST


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([], "1 to 8 methods, not 0"),
        ([sweep()] * 9, "1 to 8 methods, not 9"),
        ([replace(sweep(), learning_rates=(0.1, 0.01, 1.0))], "ascending"),
        ([replace(sweep(), learning_rates=(0.0, 0.1, 1.0))], "above zero"),
        ([replace(sweep(), loss=((1.0, 1.0),))], "1 entries for 3"),
        ([replace(sweep(), loss=((1.0,), (1.0,), (1.0,)))], "numbers of seeds"),
    ],
)
def test_sweeps_that_do_not_fit(tmp_path, methods, says):
    with pytest.raises(InputError, match=says):
        save_sensitivity(tmp_path / "s.png", "t", methods)
    assert list(tmp_path.iterdir()) == []


def test_training_shows_mean_and_deviation_of_those_that_got_so_far(tmp_path, drawn):
    course = Course("SGD", (0, 10, 20), ((3.0, 2.0, 1.0), (1.0, 4.0)), ((10.0, 20.0, 30.0),) * 2)
    save_training(tmp_path / "t.png", "t", [Training("lr 1", [course])] * 2)
    upper, lower = drawn[0].axes[0], drawn[0].axes[2]
    assert list(upper.lines[0].get_ydata()) == [2.0, 3.0, 1.0]
    band = upper.collections[0].get_paths()[0].vertices[:, 1]
    assert {1.0, 3.0, 2.0, 4.0} <= set(band.tolist()) and band.max() == 4.0
    (cross,) = [line for line in upper.lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (10, 4.0)
    assert not [line for line in lower.lines if line.get_marker() == "x"]
    assert upper.get_legend() is not None


@pytest.mark.parametrize(
    ("panels", "says"),
    [
        ([], "no configuration"),
        ([Training("a", [])], "not 0"),
        ([Training("a", [Course("b", (1,), ((1.0, 2.0),), ((1.0,),))])], "b: runs of at most 2"),
        ([Training("a", [Course("b", (1,), (), ())])], "at most 0"),
    ],
)
def test_training_that_does_not_fit(tmp_path, panels, says):
    with pytest.raises(InputError, match=says):
        save_training(tmp_path / "t.png", "t", panels)
