"""Heat maps: the bounded history against plain NumPy means, the picture by its pixels."""

import numpy as np
import pytest

from torchbp.logging.heatmap import (
    IMAGE_WIDTH,
    NAN,
    NEUTRAL,
    PLOT_LEFT,
    PLOT_TOP,
    PLOT_WIDTH,
    History,
    colour_limit,
    colours,
    draw,
    largest_units,
    row_height,
)


def filled(entries, units=3, max_columns=8, samples=2):
    rng = np.random.default_rng(0)
    blame = rng.standard_normal((entries, units))
    history = History(units, max_columns)
    for index in range(entries):
        history.add(10 * index + 5, blame[index], samples)
    return history, blame


@pytest.mark.parametrize("entries", [1, 8, 9, 16, 17, 40, 100])
def test_history_is_bounded_and_averages(entries):
    history, blame = filled(entries)
    width = history.entries_per_column
    assert len(history.steps) <= 8
    assert history.steps == [10 * i + 5 for i in range(0, entries, width)]
    assert history.last_step == 10 * (entries - 1) + 5
    expected = [blame[i : i + width].mean(axis=0) / 2 for i in range(0, entries, width)]
    np.testing.assert_allclose(history.matrix(), np.transpose(expected), rtol=1e-5, atol=1e-6)


def test_history_weighs_by_samples():
    history = History(1, 2)
    for step, (blame, samples) in enumerate([(2.0, 1), (6.0, 3), (1.0, 4)]):
        history.add(step, np.array([blame]), samples)
    np.testing.assert_allclose(history.matrix(), [[8.0 / 4, 1.0 / 4]])


def test_nan_spreads_to_its_column_only():
    history, _ = filled(8)
    history.add(999, np.array([np.nan, 0.0, 0.0]), 2)
    assert np.isnan(history.matrix()).tolist() == [[False] * 4 + [True], [False] * 5, [False] * 5]


def test_largest_units_ignore_nan_and_keep_order_of_ties():
    matrix = np.array([[1.0, -1.0], [np.nan, 3.0], [0.0, 0.0], [2.0, 0.0]])
    assert largest_units(matrix, 3).tolist() == [1, 0, 3]


def test_colours():
    values = np.array([0.0, 1.0, -1.0, 0.25, 50.0, np.inf, -np.inf, np.nan])
    got = colours(values, 1.0).astype(int)
    assert got[0].tolist() == list(NEUTRAL)
    assert got[7].tolist() == list(NAN)
    for red, green, blue in got[[1, 3, 4, 5]]:
        assert red > green > blue, "orange"
    for red, green, blue in got[[2, 6]]:
        assert blue > green > red, "blue"
    assert (got[4] == got[1]).all() and (got[5] == got[1]).all() and (got[6] == got[2]).all()
    # A quarter of the limit is drawn half as strong.
    assert np.abs(got[3] - (got[0] + got[1]) / 2).max() <= 1


def test_colour_limit_ignores_one_wild_cell():
    matrix = np.ones((10, 100))
    matrix[0, 0] = 1e6
    assert colour_limit(matrix) == 1.0
    assert colour_limit(np.zeros((2, 2))) == 1.0
    assert colour_limit(np.full((2, 2), np.nan)) == 1.0
    assert colour_limit(np.array([[0.0] * 999 + [-3.0]])) == 3.0


def cell(picture, row, rows, x):
    height = row_height(rows)
    return picture[PLOT_TOP + row * height + height // 2, PLOT_LEFT + x].astype(int)


def test_picture_shows_the_cells():
    pytest.importorskip("PIL")
    history = History(4, 8)
    for step in range(4):
        history.add(step, np.array([0.0, 3.0, -2.0, np.nan if step == 3 else 1.0]), 1)
    picture = draw(history, "fc", 4)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (IMAGE_WIDTH, 3)
    for x in (0, PLOT_WIDTH // 2, PLOT_WIDTH - 1):  # rows: units 1, 2, 3, 0
        red, green, blue = cell(picture, 0, 4, x)
        assert red > green > blue
        red, green, blue = cell(picture, 1, 4, x)
        assert blue > green > red
        assert cell(picture, 3, 4, x).tolist() == list(NEUTRAL)
    quarter = PLOT_WIDTH // 4
    red, green, blue = cell(picture, 2, 4, 3 * quarter - 1)
    assert red > green > blue
    assert cell(picture, 2, 4, 3 * quarter).tolist() == list(NAN)


def test_size_is_constant_over_time():
    pytest.importorskip("PIL")
    history = History(100, 8)
    shapes = set()
    for step in range(30):
        history.add(step * 1000, np.random.default_rng(step).standard_normal(100), 3)
        shapes.add(draw(history, "fc", 48).shape)
    assert len(shapes) == 1


@pytest.mark.parametrize("title", ["", "a\nb\x1b", "層 ☃ \ud800", "x" * 2000])
def test_any_name_can_be_drawn(title):
    pytest.importorskip("PIL")
    history, _ = filled(3)
    assert draw(history, title, 48).shape == draw(history, "fc", 48).shape


def test_labels_and_title_leave_ink():
    pytest.importorskip("PIL")
    history, _ = filled(3)
    picture = draw(history, "fc", 48)
    assert (picture[:PLOT_TOP] < 128).any(), "title"
    assert (picture[PLOT_TOP:, :PLOT_LEFT] < 128).any(), "unit labels"
    assert (draw(history, "fc", 48) != draw(history, "other", 48)).any(), "name of the layer"


def test_all_nan_is_drawn():
    pytest.importorskip("PIL")
    history = History(2, 4)
    history.add(1, np.full(2, np.nan), 1)
    assert cell(draw(history, "fc", 2), 1, 2, 9).tolist() == list(NAN)
