"""Pictures of a run: well-formed, the same bytes each time, and literal about names."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from fedlearn.charts import draw_history, draw_partition
from fedlearn.errors import DependencyError

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>",
    "$x^2$",
    "_hidden",
    "a & b ]]>",
    "\\frac{",
    "nul\x00\ud800\ufffe",
    "数据",
    "é",
]
HISTORY = {"loss": [2.0, 1.0, 0.5], "accuracy": [0.1, 0.5, 0.75]}
COUNTS = np.array([[5, 0, 2], [1, 1, 1], [0, 9, 0]])
NAMES = ["cat", "dog", "owl"]


def parse(svg):
    return ET.fromstring(svg)  # noqa: S314 - our own text


def texts(svg):
    return ["".join(node.itertext()) for node in parse(svg).iter(f"{SVG}text")]


def paths(svg):
    """The polylines of series: open, unfilled and 1.8 wide."""
    return [node.get("d") for node in parse(svg).iter(f"{SVG}path") if "stroke-width: 1.8" in node.get("style", "")]


def many(clients, labels):
    return np.random.default_rng(0).integers(0, 50, (clients, labels))


PICTURES = {
    "history": lambda title="t": draw_history([1, 2, 3], HISTORY, title=title),
    "bars": lambda title="t": draw_partition(COUNTS, NAMES, title=title),
    "map": lambda title="t": draw_partition(many(300, 3), NAMES, title=title),
}


@pytest.fixture(params=PICTURES)
def picture(request):
    return PICTURES[request.param]


def test_a_picture_is_one_accessible_element_with_a_white_background(picture):
    svg = picture("who & what <b>")
    root = parse(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == "who & what <b>"
    assert "who & what <b>" in texts(svg)
    background = next(root.iter(f"{SVG}path"))
    assert "fill: #ffffff" in background.get("style")


def test_the_same_input_gives_the_same_bytes_whatever_the_users_settings(picture):
    first = picture()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "text.usetex": True}):
        assert picture() == first
        assert matplotlib.rcParams["font.size"] == 30
    assert picture() == first


def test_nothing_outside_the_file_is_referred_to(picture):
    for node in parse(picture()).iter():
        assert "metadata" not in node.tag
        for key, value in node.attrib.items():
            if "href" in key or "src" in key:
                assert value.startswith(("#", "data:image/png;base64,"))
            assert "http" not in value
    assert picture().count("http") == 2  # the two name spaces


def test_text_stays_text_in_a_font_everyone_has(picture):
    svg = picture()
    assert texts(svg)
    assert all("sans-serif" in node.get("style") for node in parse(svg).iter(f"{SVG}text"))


def test_pyplot_is_left_alone(picture):
    before = "matplotlib.pyplot" in sys.modules
    picture()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_error_says_what_to_install(picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"\.\[simulation\]"):
        picture()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_drawn_as_it_is_spelled(hostile):
    legal = hostile.replace("\x00", "\ufffd").replace("\ud800", "\ufffd").replace("\ufffe", "\ufffd")
    for svg in (
        draw_history([1, 2], {hostile: [0.1, 0.2]}, title=hostile),
        draw_partition(COUNTS, [hostile, "b", "c"], title=hostile),
        draw_partition(many(70, 3), [hostile, "b", "c"], title=hostile),
    ):
        root = parse(svg)
        assert root.find(f"{SVG}title").text == legal
        assert sum(legal[:23] in text for text in texts(svg)) >= 2
        assert "script" not in {node.tag.removeprefix(SVG) for node in root.iter()}


def test_long_names_are_cut():
    svg = draw_history([1], {"x" * 500: [0.5]}, title="y" * 5000)
    assert max(len(text) for text in texts(svg)) < 120


def test_losses_and_scores_have_a_panel_each():
    drawn = texts(draw_history([1, 2, 3], HISTORY, title="t"))
    assert {"loss", "score", "accuracy"} <= set(drawn)
    assert drawn.count("round") == 2
    assert {"0.500", "0.750"} <= set(drawn)  # the last values
    assert {"1", "2", "3"} <= set(drawn)


def test_a_loss_below_one_is_still_a_loss_and_a_score_above_one_is_not_a_score():
    assert "score" not in texts(draw_history([1, 2], {"val_loss": [0.5, 0.4]}, title="t"))
    assert "score" not in texts(draw_history([1, 2], {"norm": [0.5, 4.0]}, title="t"))
    assert "score" in texts(draw_history([1, 2], {"auc": [0.5, 0.4]}, title="t"))


def test_without_scores_there_is_only_the_loss_panel():
    svg = draw_history([1, 2], {"loss": [1.0, 0.5], "accuracy": [None, None]}, title="t")
    drawn = texts(svg)
    assert "loss" in drawn
    assert not {"score", "accuracy"} & set(drawn)


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_a_gap(gap):
    whole = paths(draw_history([1, 2, 3, 4, 5], {"loss": [5.0, 4.0, 3.0, 2.0, 1.0]}, title="t"))[0]
    holed = paths(draw_history([1, 2, 3, 4, 5], {"loss": [5.0, 4.0, gap, 2.0, 1.0]}, title="t"))[0]
    assert (whole.count("M"), whole.count("L")) == (1, 4)
    assert (holed.count("M"), holed.count("L")) == (2, 2)


def test_lone_values_of_a_long_run_are_dots():
    values = [None if i % 10 else 1.0 + i for i in range(100)]
    svg = draw_history(list(range(100)), {"loss": values}, title="t")
    root = parse(svg)
    fills = [node for node in root.iter(f"{SVG}use") if "#0072b2" in node.get("style", "")]
    assert len(fills) == 10


def test_a_series_that_was_never_finite_is_named():
    assert "loss (not finite)" in texts(draw_history([1, 2], {"loss": [math.nan, math.inf]}, title="t"))


@pytest.mark.parametrize("rounds", [[1], [7], [], [10**6, 10**6 + 1]])
def test_any_number_of_rounds(rounds):
    series = {"loss": [0.5] * len(rounds), "accuracy": [0.5] * len(rounds)}
    drawn = texts(draw_history(rounds, series, title="t"))
    assert all(f"{number:,}" in drawn for number in rounds)


def test_what_else_there_is_has_a_panel_each_from_nought_up():
    more = {"clients": {"answered": [90, 1234, None]}, "simulated seconds": {"of each round": [61.25, 70, 80.5]}}
    svg = draw_history([1, 2, 3], HISTORY, title="t", more=more)
    drawn = texts(svg)
    assert {"loss", "score", "clients", "answered", "simulated seconds", "of each round"} <= set(drawn)
    assert {"0.500", "0.750", "1,234", "80.5"} <= set(drawn), "the last values"
    assert drawn.count("round") == 4
    assert "0" in drawn
    assert float(parse(svg).get("height").removesuffix("pt")) > 500, "below, not squeezed in"
    only = texts(draw_history([1], {}, title="t", more={"clients": {"answered": [0]}}))
    assert "nothing was measured" not in only
    assert draw_history([1, 2, 3], HISTORY, title="t", more={}) == draw_history([1, 2, 3], HISTORY, title="t")


def test_nothing_measured_is_said():
    assert "nothing was measured" in texts(draw_history([1], {}, title="t"))


def test_a_diverging_loss_is_drawn_on_a_logarithmic_axis():
    drawn = texts(draw_history([1, 2, 3], {"loss": [1.0, 1e3, 1e7]}, title="t"))
    assert "loss (logarithmic)" in drawn
    assert not any("$" in text or "mathdefault" in text for text in drawn)


def test_twenty_series_are_all_named():
    series = {f"loss {i}": [1.0 + i, 2.0 + i] for i in range(20)}
    assert set(series) <= set(texts(draw_history([1, 2], series, title="t")))


def test_last_values_that_coincide_do_not_overlap():
    svg = draw_history([1, 2], {f"loss {i}": [1.0, 0.5] for i in range(4)}, title="t")
    nodes = [node for node in parse(svg).iter(f"{SVG}text") if node.text == "0.500"]
    heights = sorted(float(node.get("y")) for node in nodes)
    assert len(heights) == 4
    assert min(np.diff(heights)) > 9


def test_a_series_of_another_length_is_refused():
    with pytest.raises(ValueError, match="'loss' has 1 values for 2 rounds"):
        draw_history([1, 2], {"loss": [1.0]}, title="t")


def test_bars_show_every_label_client_and_total():
    drawn = texts(draw_partition(COUNTS, NAMES, title="t"))
    assert {*NAMES, "0", "1", "2", "7", "3", "9", "client", "examples"} <= set(drawn)


def test_thirty_labels_look_different():
    svg = draw_partition(np.ones((2, 30), dtype=np.int64), [f"n{i}" for i in range(30)], title="t")
    looks = [node.get("style") for node in parse(svg).iter(f"{SVG}path") if "fill" in node.get("style", "")]
    fills = {style.split(";")[0] for style in looks if "stroke-width: 0.4" in style}
    assert len(fills) == 30


@pytest.mark.parametrize(("clients", "labels"), [(61, 3), (2000, 10), (5, 62), (241, 1), (1, 100)])
def test_many_clients_or_labels_become_a_heat_map(clients, labels):
    svg = draw_partition(many(clients, labels), [f"n{i}" for i in range(labels)], title="t")
    root = parse(svg)
    assert len(list(root.iter(f"{SVG}image"))) == 2  # the map and its colour bar
    assert len(svg) < 300_000
    assert any(text.startswith("largest") for text in texts(svg))


@pytest.mark.parametrize("counts", [np.zeros((3, 3), dtype=np.int64), np.zeros((99, 3), dtype=np.int64)])
def test_clients_without_examples_are_drawn(counts):
    parse(draw_partition(counts, NAMES, title="t"))


@pytest.mark.parametrize(
    ("counts", "names"),
    [(np.zeros((0, 3)), NAMES), (np.zeros(3), NAMES), (COUNTS, NAMES[:2]), (-COUNTS, NAMES)],
)
def test_what_is_no_table_of_counts_is_refused(counts, names):
    with pytest.raises(ValueError, match=r"counts|labels but"):
        draw_partition(counts.astype(np.int64), names, title="t")
