"""The picture of what a server saw of one client."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import matplotlib
import pytest

from fedlearn.charts import draw_masked
from fedlearn.errors import DependencyError

SVG = "{http://www.w3.org/2000/svg}"
MASKED, PLAIN = [5, 6, 4, 5], [0, 9, 11, 0]
BOTH = {"what the server got": MASKED, "before masking": PLAIN}


def draw(histograms=None, *, bits=21, title="t"):
    return draw_masked(BOTH if histograms is None else histograms, bits=bits, title=title)


def parse(svg):
    return ET.fromstring(svg)  # noqa: S314 - our own text


def texts(svg):
    return ["".join(node.itertext()) for node in parse(svg).iter(f"{SVG}text")]


def heights(svg, colour):
    """How high the steps of the histogram of a colour are, from left to right."""
    (path,) = [n.get("d") for n in parse(svg).iter(f"{SVG}path") if f"fill: {colour}" in (n.get("style") or "")]
    points = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]
    bottom = max(y for _, y in points)
    tops = [(a[0], bottom - a[1]) for a, b in pairwise(points) if a[1] == b[1] and b[0] > a[0]]
    return [height for _, height in sorted(tops)]


def test_it_is_one_accessible_element_with_a_white_background():
    root = parse(draw(title="who & what <b>"))
    assert (root.tag, root.get("role"), root[0].text) == (f"{SVG}svg", "img", "who & what <b>")
    assert "fill: #ffffff" in next(root.iter(f"{SVG}path")).get("style")


def test_the_same_arguments_give_the_same_bytes_whatever_the_users_settings():
    first = draw()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert draw() == first
    assert first.count("http") == 2  # the two name spaces: nothing outside is referred to


def test_both_are_named_and_share_the_axis_of_values():
    drawn = texts(draw(title="round 3"))
    assert {*BOTH, "round 3", "value of an integer of 21 bits"} <= set(drawn)
    for end in ("−1,048,576", "0", "1,048,576"):
        assert end in drawn
    assert drawn.count("1,048,576") == 1
    assert drawn.count("integers a bin") == 2


def test_every_width_of_an_integer_has_its_own_ends():
    assert "−32,768" in texts(draw(bits=16))
    assert "2,147,483,648" in texts(draw(bits=32))


def test_bars_are_as_high_as_what_they_count():
    svg = draw()
    masked, plain = heights(svg, "#0072b2"), heights(svg, "#d55e00")
    assert [height / masked[0] for height in masked] == pytest.approx([1, 1.2, 0.8, 1], abs=0.01)
    assert plain[2] / plain[1] == pytest.approx(11 / 9, abs=0.01)


def test_what_even_would_be_is_said():
    assert sum("perfectly even: 5 a bin" in text for text in texts(draw())) == 2
    assert any("perfectly even: 10.2 a bin" in text for text in texts(draw({"a": [10] * 63 + [20]})))


def test_one_alone_and_one_of_nothing():
    assert "value of an integer of 21 bits" in texts(draw({"alone": MASKED}))
    assert any("perfectly even: 0 a bin" in text for text in texts(draw({"nothing": [0] * 64})))


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "$x^2$", "_hidden", "a & b ]]>", "\\frac{", "数据"])
def test_hostile_text_is_drawn_as_it_is_spelled(hostile):
    svg = draw({hostile: MASKED}, title=hostile)
    assert texts(svg).count(hostile) == 2
    assert "script" not in {node.tag.removeprefix(SVG) for node in parse(svg).iter()}


def test_long_names_are_cut():
    assert max(len(text) for text in texts(draw({"x" * 500: MASKED}, title="y" * 5000))) < 120


def test_what_cannot_be_drawn_is_refused():
    for wrong in ({}, {"a": MASKED, "b": MASKED, "c": MASKED}):
        with pytest.raises(ValueError, match=f"{len(wrong)} histograms"):
            draw(wrong)
    for wrong in ([], [1, -1]):
        with pytest.raises(ValueError, match="'a' has no bins, or a negative count"):
            draw({"a": wrong})


def test_pyplot_is_left_alone():
    before = "matplotlib.pyplot" in sys.modules
    draw()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match="simulation"):
        draw()
