"""Who shares masks and secrets with whom: everybody up to 128 clients, a k-regular ring graph above.

On the ring every client is the neighbour of those up to k/2 places before and behind it (a Harary graph). Places are
shuffled by the roster's hash, which no one party chooses. All probabilities here are exact: ratios of integers,
compared without rounding.

Of n clients A = ⌊γn⌋ collude with the server and D = ⌊δn⌋ drop out; who does is settled independently of the shuffle.
A client's k neighbours are then drawn from the n − 1 others without replacement, and three things may go wrong:

- *Cut.* Survivors that do not collude are connected by masks unless the ring is cut in two places. Two of them next
  to each other on the ring are neighbours unless k/2 clients or more between them are gone (colluding or dropped), and
  one such gap leaves a path the other way round. There are n(n − k + 1)/2 pairs of disjoint stretches of k/2 places,
  and any k given places are all gone with probability C(A + D, k)/C(n, k). The union bound n(n − k + 1)/2 times that
  must be at most 2^-(σ+1). It only falls when fewer are gone. For k > A + D it is zero.
- *Too many collude.* Let X ~ Hyp(n − 1, A, k) be a client's colluding neighbours and a the smallest x with
  P[X > x] ≤ 2^-(σ+1)/n: except with 2^-(σ+1), no client has more than a of them. The threshold t must be above a. A
  server that lies to some neighbours about who survived collects shares of *one* secret from each honest neighbour
  and of both from colluding ones, k + a at most; so 2t > k + a there.
- *Too few answer.* Let Z ~ Hyp(n − 1, D, k) be the dropped neighbours of a client that survived (one that dropped
  has fewer). P[k − Z < t] ≤ 2^-η/n: except with 2^-η, every secret that is needed can be rebuilt.

σ is 40, and 80 where the server is active and may try rosters until it finds one that suits it; η is 20.

**What is weaker.** Whoever drops out is independent of the graph only while the server tells the truth. One that has
seen the graph and calls dropped whom it likes makes two gaps at will, and then wants the sum of one stretch between
them. The clients at its two ends have at most k/2 neighbours inside, and unmasking them takes t shares each; so
2(t − k/2) = 2t − k > a of the k places in the two gaps must collude. The number that do is Hyp(n, A, k), and above a
with probability at most 2^-(σ+1)/n; over all pairs of gaps that makes (n − k + 1)/2 · 2^-(σ+1): below 2^-69 rather than
2^-81 for 5,000 clients. If clients insist on n − D survivors, it is zero for k > A + D. The complete graph has no gaps.

Reference: Bell, Bonawitz, Gascón, Lepoint, Raykova, https://eprint.iacr.org/2020/704.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count

__all__ = [
    "COMPLETE_UP_TO",
    "SEED_BYTES",
    "Graph",
    "Ring",
    "choose_graph",
    "counts",
    "find_parameters",
    "graph_of",
    "neighbours",
    "ring_permutation",
]

COMPLETE_UP_TO = 128
"""The largest cohort in which everybody is everybody's neighbour."""

SEED_BYTES = 32
"""The length of what a ring is shuffled by: a SHA-256 hash."""

_TAG = b"fedlearn.secagg/graph/1"
_SECRECY_BITS = {False: 40, True: 80}  # σ by whether the server is active
_LIVENESS_BITS = 20  # η
_LEAST_THRESHOLD = 2  # with 1, a share would be the secret itself
_MOST_CLIENTS = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """How many neighbours each client has, and how many of them rebuild one of its secrets.

    Attributes:
        n: how many clients there are, at least 2.
        k: how many neighbours each has: n − 1, or an even number below that.
        threshold: how many shares rebuild a secret: up to k, or n on the complete graph, where a client may hold a
            share of its own.

    Raises:
        ValueError: one of the three is out of range.

    >>> Graph(n=1000, k=66, threshold=49).complete
    False
    """

    n: int
    k: int
    threshold: int

    def __post_init__(self) -> None:
        if not 2 <= self.n <= _MOST_CLIENTS:
            raise ValueError(f"n must be in [2, 2^32), got {self.n}")
        if not 1 <= self.k <= self.n - 1 or (self.k % 2 and not self.complete):
            raise ValueError(f"k must be n - 1 = {self.n - 1}, or even and between 2 and that, got {self.k}")
        most = self.n if self.complete else self.k
        if not 1 <= self.threshold <= most:
            raise ValueError(f"threshold must be in [1, {most}], got {self.threshold}")

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour."""
        return self.k == self.n - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """Clients in a circle.

    Attributes:
        order: the client at each place; a permutation of 0 … n − 1.
        places: the place of each client, the inverse of ``order``.
    """

    order: tuple[int, ...]
    places: tuple[int, ...]


def choose_graph(n: int, *, colluding: float, dropping: float, active: bool) -> Graph:
    """Return the graph of ``n`` clients: the complete one up to 128, else the sparsest that ``find_parameters`` finds.

    On the complete graph the threshold is ⌊2n/3⌋ + 1, or more where more than a third collude. Whether enough clients
    answer shows in the round.

    Guarantees: fewer than ``threshold`` colluding neighbours, and with ``active`` 2·threshold > k + 1 + their number:
    always on the complete graph, as the module says on a sparse one.

    Args:
        n: how many clients, at least 2.
        colluding: γ, the share of the clients that collude with the server, in [0, 1).
        dropping: δ, the share of the clients that drop out, in [0, 1).
        active: whether the server may lie.

    Raises:
        ValueError: ``n`` or a share is out of range, so many collude that no threshold is a protection, or no sparse
            graph will do (the complete one might: that is the caller's to decide).

    >>> choose_graph(12, colluding=0.1, dropping=0.1, active=True)
    Graph(n=12, k=11, threshold=9)
    """
    corrupt, dropped = counts(n, colluding, dropping)
    return graph_of(n, corrupt=corrupt, dropped=dropped, active=active)


def graph_of(n: int, *, corrupt: int, dropped: int, active: bool) -> Graph:
    """Return the same graph for numbers of clients instead of shares.

    Of a cohort of which some never came, as many as before may collude among those that did. On the complete graph the
    threshold then rises above ⌊2n/3⌋ + 1, so that 2·threshold > n + ``corrupt`` still holds.

    Args:
        n: how many clients there are.
        corrupt: A, how many of them may collude.
        dropped: D, how many of them may be lost; on the complete graph that shows in the round.
        active: whether the server may lie.

    Raises:
        ValueError: no graph withstands so many.

    >>> graph_of(22, corrupt=9, dropped=2, active=True).threshold
    16
    """
    if n > COMPLETE_UP_TO:
        found = _search(n, corrupt, dropped, active)
        if found is None:
            raise ValueError(f"no k < n - 1 is enough for n = {n}, of which {corrupt} collude and {dropped} are lost")
        return Graph(n=n, k=found[0], threshold=found[1])
    threshold = max(2 * n // 3 + 1, (n + corrupt) // 2 + 1 if active else corrupt + 1)
    if threshold > n:
        raise ValueError(f"{corrupt} of n = {n} clients colluding break any graph")
    return Graph(n=n, k=n - 1, threshold=threshold)


def find_parameters(n: int, *, colluding: float, dropping: float, active: bool) -> tuple[int, int]:
    """Return the smallest even k < n − 1 that keeps the module's three conditions, and the smallest t for it.

    The shares are taken as the decimal numbers they are written as: 0.29 of 100 clients are 29, although the float
    is a little less. Every party therefore finds the same. The smallest t is 2. Results are cached.

    Args:
        n: how many clients.
        colluding: γ, in [0, 1).
        dropping: δ, in [0, 1), with γ + δ < 1.
        active: whether the server may lie: σ = 80 and 2t > k + a, rather than σ = 40.

    Returns:
        (k, t): the number of neighbours and the threshold.

    Raises:
        ValueError: ``n`` or a share is out of range, or there is no such k.

    >>> find_parameters(1000, colluding=0.05, dropping=0.05, active=True)
    (66, 49)
    """
    found = _search(n, *counts(n, colluding, dropping), active)
    if found is None:
        raise ValueError(
            f"no k < n - 1 is enough for n = {n}, colluding = {colluding}, dropping = {dropping} and "
            f"{'an active' if active else 'a semi-honest'} server"
        )
    return found


def ring_permutation(n: int, seed: bytes) -> Ring:
    """Return the ring of ``n`` clients that ``seed`` shuffles: a Fisher-Yates shuffle, O(n).

    For place = n − 1 down to 1, the client at ``place`` changes places with the one at a number drawn from
    [0, place]: the lowest ``place.bit_length()`` bits of the next word, or of the first word after it where they are
    not above ``place``. The words are 32 bits, big-endian, of SHA-256("fedlearn.secagg/graph/1" ‖ seed ‖ i) for
    i = 0, 1, … as 8 bytes, big-endian.

    Guarantees: with the words taken as uniform, every order is exactly equally likely; the same on every machine.

    Args:
        n: how many clients, in [1, 2^32).
        seed: 32 bytes, the roster's hash.

    Raises:
        ValueError: ``n`` is out of range, or ``seed`` has another length.
    """
    if not 1 <= n <= _MOST_CLIENTS:
        raise ValueError(f"n must be in [1, 2^32), got {n}")
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed must have {SEED_BYTES} bytes, this has {len(seed)}")
    order = _shuffled(n, _words(seed))
    places = [0] * n
    for place, client in enumerate(order):
        places[client] = place
    return Ring(order=tuple(order), places=tuple(places))


def neighbours(graph: Graph, index: int, permutation: Ring) -> tuple[int, ...]:
    """Return the indices of a client's ``graph.k`` neighbours, sorted, in O(k log k).

    Guarantees: nobody is its own neighbour; j is a neighbour of i exactly where i is one of j; the graph is connected.
    On a complete graph ``permutation`` makes no difference.

    Raises:
        ValueError: there is no client ``index``, or ``permutation`` is not of ``graph.n`` clients.

    >>> ring = ring_permutation(6, bytes(32))
    >>> ring.order
    (3, 1, 0, 2, 5, 4)
    >>> neighbours(Graph(n=6, k=2, threshold=2), 3, ring)
    (1, 4)
    """
    n = graph.n
    if not 0 <= index < n:
        raise ValueError(f"index must be in [0, {n}), got {index}")
    if len(permutation.order) != n:
        raise ValueError(f"a ring of {len(permutation.order)} clients is not one of n = {n}")
    if graph.complete:
        return (*range(index), *range(index + 1, n))
    place, half = permutation.places[index], graph.k // 2
    return tuple(sorted(permutation.order[(place + step) % n] for step in range(-half, half + 1) if step))


# -- parameters ----------------------------------------------------------------------------------------------------


def counts(n: int, colluding: float, dropping: float) -> tuple[int, int]:
    """Return how many of ``n`` clients collude and how many drop out, rounded down."""
    if not 2 <= n <= _MOST_CLIENTS:
        raise ValueError(f"n must be in [2, 2^32), got {n}")
    for name, share in (("colluding", colluding), ("dropping", dropping)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be in [0, 1), got {share}")
    corrupt, dropped = Fraction(str(float(colluding))), Fraction(str(float(dropping)))
    if corrupt + dropped >= 1:
        raise ValueError(f"colluding + dropping must be below 1, got {colluding} + {dropping}")
    return math.floor(corrupt * n), math.floor(dropped * n)


@lru_cache(maxsize=256)
def _search(n: int, corrupt: int, dropped: int, active: bool) -> tuple[int, int] | None:
    """Return the smallest k and t for so many clients, or ``None``."""
    secrecy = _SECRECY_BITS[active] + 1
    degrees = range(2, n - 1, 2)
    enough = bisect_left(degrees, True, key=lambda k: _cut_bound(n, k, corrupt + dropped) <= Fraction(1, 2**secrecy))
    if enough == len(degrees):
        return None
    levels = zip(_levels(n - 1, corrupt, n << secrecy), _levels(n - 1, dropped, n << _LIVENESS_BITS), strict=True)
    for k, (colluding, missing) in enumerate(levels):
        if k not in degrees[enough:]:
            continue
        threshold = max(_LEAST_THRESHOLD, colluding + 1, (k + colluding) // 2 + 1 if active else 0)
        if threshold <= k - missing:
            return k, threshold
    return None


def _cut_bound(n: int, k: int, gone: int) -> Fraction:
    """Return a bound on the probability that ``gone`` of ``n`` clients cut the ring in two places; falls with k."""
    return Fraction(n * (n - k + 1) * math.perm(gone, k), 2 * math.perm(n, k))


def _levels(population: int, marked: int, rarity: int) -> Iterator[int]:
    """Yield min{x : P[Hyp(population, marked, draws) > x] ≤ 1/rarity} for draws = 0, 1, … population.

    In integers, by counting the sets of so many draws: ``total`` of them, ``here`` with exactly ``level`` marked and
    ``above`` with more. The level never falls from one draw to the next, and rises by 1 at most.
    """
    level, total, here, above = 0, 1, 1, 0
    for draws in count():
        if above * rarity > total:
            level += 1
            here = math.comb(marked, level) * math.comb(population - marked, draws - level)
            above -= here
        yield level
        if draws == population:
            return
        # one draw more: each larger set comes of draws + 1 smaller ones
        above = (above * (population - draws) + here * (marked - level)) // (draws + 1)
        here = here * (population - marked - draws + level) // (draws + 1 - level)
        total = total * (population - draws) // (draws + 1)


# -- shuffling -----------------------------------------------------------------------------------------------------


def _words(seed: bytes) -> Iterator[int]:
    """Yield 32-bit words of SHA-256 in counter mode."""
    for block in count():
        digest = hashlib.sha256(_TAG + seed + block.to_bytes(8, "big")).digest()
        for start in range(0, len(digest), 4):
            yield int.from_bytes(digest[start : start + 4], "big")


def _shuffled(n: int, words: Iterator[int]) -> list[int]:
    """Return 0 … n − 1 in the order that uniform ``words`` of 32 bits shuffle them to."""
    order = list(range(n))
    for place in range(n - 1, 0, -1):
        mask = (1 << place.bit_length()) - 1
        other = next(words) & mask
        while other > place:  # dropped, not wrapped around: a remainder would favour small numbers
            other = next(words) & mask
        order[place], order[other] = order[other], order[place]
    return order
