"""The picture of epsilon over the rounds."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET

import pytest

from fedlearn.charts import draw_epsilon
from fedlearn.errors import DependencyError

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314 - our own text


def curves(svg: str) -> list[str]:
    nodes = ET.fromstring(svg).iter(f"{SVG}path")  # noqa: S314
    return [node.get("d", "") for node in nodes if "stroke-width: 1.8" in node.get("style", "")]


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (draw_epsilon([1, 2, 3], [0.5, 0.7, 0.9], budget=8.0, title="t") for _ in range(2))
    assert first == second
    assert first.startswith("<svg ")


def test_budget_axes_and_the_last_value_are_named() -> None:
    drawn = texts(draw_epsilon([1, 2, 3], [0.5, 0.7, 1.234], budget=8.0, title="digits <1>"))
    assert {"budget 8", "round", "epsilon spent", "1.23", "digits <1>"} <= set(drawn)


def test_without_a_budget_there_is_no_line_of_it() -> None:
    for budget in (None, math.inf):
        assert not any("budget" in text for text in texts(draw_epsilon([1, 2], [0.5, 0.7], budget=budget, title="t")))


@pytest.mark.parametrize("unbounded", [math.inf, math.nan])
def test_infinity_is_words_and_nothing_after_it_is_drawn(unbounded: float) -> None:
    svg = draw_epsilon([1, 2, 3, 4], [0.5, 0.6, unbounded, 0.7], title="t")
    assert "infinite from round 3" in texts(svg)
    assert curves(svg)[0].count("L") == 2  # one step, from round 1 to round 2
    assert "infinite from round 1" in texts(draw_epsilon([1], [unbounded], title="t"))


def test_more_epsilon_is_higher() -> None:
    low, high = (curves(draw_epsilon([1, 2], [1.0, top], budget=8.0, title="t"))[0] for top in (2.0, 6.0))
    ends = [float(path.split()[-1]) for path in (low, high)]
    assert ends[1] < ends[0]  # an SVG counts down from the top


def test_nothing_released_is_said() -> None:
    assert "nothing was released" in texts(draw_epsilon([], [], budget=8.0, title="t"))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 epsilons for 2 rounds"):
        draw_epsilon([1, 2], [0.5], title="t")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match="simulation"):
        draw_epsilon([1], [0.5], title="t")
