"""What a run promises, or promised, in words: never "private" alone, always whom, against whom and how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.cli.rendering import number_text

__all__ = ["SERVER_SEES", "epsilon_text", "promise_rows"]

_HIDES = {
    "example": "each example of a client, from everybody else, the server included",
    "client": "each client, from other clients and whoever gets the model; the server is trusted",
    "ideal": "each client, from other clients and whoever gets the model; not from the server, which under "
    "secagg.mode = ideal sees each update with its own share of the noise alone",
    "distributed": "each client, from everybody else, the server included, as long as enough clients are honest",
}
SERVER_SEES = {
    "off": "every client's update",
    "ideal": "every client's encoded update: secagg.mode = ideal is for simulations and masks nothing",
    "semi-honest": "the sum of a round's updates, if it keeps to the protocol (secagg.mode = semi-honest)",
    "active": "the sum of a round's updates, and no single one (secagg.mode = active)",
}
"""What the server sees of the clients, by ``secagg.mode``."""

_SIMULATED = "from the seed, so nobody is protected: this is what a real run would spend"


def epsilon_text(value: float | str) -> str:
    """Return an epsilon, which may be infinite.

    >>> epsilon_text("inf"), epsilon_text(7.98765)
    ('infinite', '7.9877')
    """
    return "infinite" if isinstance(value, str) else number_text(value)


def _promise(privacy: Mapping[str, Any], *, masked: bool) -> str:
    """Return which promise is made."""
    if privacy.get("trust") != "distributed":
        return str(privacy["unit"])
    return "distributed" if masked else "ideal"


def promise_rows(privacy: Mapping[str, Any], rounds: int, *, masked: bool = True) -> list[tuple[str, str]]:
    """Return what ``summary.json`` or a plan says of privacy, as names and values.

    Args:
        privacy: the table ``privacy`` of one of them.
        rounds: how many rounds were finished.
        masked: whether updates are masked, where clients add the noise themselves.
    """
    if privacy["unit"] == "none":
        return [("privacy", "none promised: epsilon is infinite (privacy.unit = none)")]
    budget = f" of {privacy['budget']:g}" if privacy.get("budget") is not None else ""
    example = privacy["unit"] == "example"
    delta = f" at delta {'up to ' * example}{privacy['delta']:.5g}" if "delta" in privacy else ""
    most = ", the largest of the clients" if example else ""
    rows = [
        ("epsilon", f"{epsilon_text(privacy['epsilon'])}{budget}{delta}{most}"),
        ("hides", _HIDES[_promise(privacy, masked=masked)]),
    ]
    if privacy.get("noise_multiplier") is not None:
        rows.append(("noise", f"{number_text(privacy['noise_multiplier'])} times the clipping norm"))
    if privacy.get("simulated"):
        rows.append(("noise drawn", _SIMULATED))
    if "stopped" in privacy:
        reason = f"after round {rounds}: round {rounds + 1} would bring epsilon above the budget"
        untrained = "before round 1, which alone would bring epsilon above the budget; the model is untrained"
        rows.append(("stopped", f"{reason}; the model of round {rounds} is kept" if rounds else untrained))
    return rows
