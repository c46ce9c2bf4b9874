"""Deal the examples of one data set out to the clients of a simulation.

On devices the data is already distributed; in a simulation these functions decide who holds what.

Guarantees, for every function that returns parts: one sorted int64 index array per client; every
example goes to exactly one client and none is lost; no client is empty; the result is a function of
the arguments alone, the generator's state included.
"""

from __future__ import annotations

import heapq
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.errors import ConfigError, TaskError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fedlearn.sources import SeedTree

__all__ = ["SCHEMES", "dirichlet", "iid", "label_counts", "natural", "partition", "quantity", "shards"]

SCHEMES = ("dirichlet", "iid", "natural", "quantity", "shards")

_NEEDS_LABELS = frozenset({"dirichlet", "shards"})

# Below this the Dirichlet distribution is one-hot to double precision, and log(u) / alpha would overflow.
_SMALLEST_ALPHA = 1e-300


def iid(size: int, clients: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """Deal ``size`` examples out at random, the same number to every client.

    Guarantees: as the module's; sizes differ by at most one, the first ``size % clients`` having one more.

    Args:
        size: number of examples.
        clients: number of clients, from 1 to ``size``.
        rng: where chance comes from.

    Returns:
        One sorted index array per client.

    Raises:
        ConfigError: ``federation.clients`` is below 1 or above ``size``.

    Reference: McMahan et al., arXiv:1602.05629, section 3, "IID".

    >>> [part.size for part in iid(10, 4, np.random.default_rng(0))]
    [3, 3, 2, 2]
    """
    _check_clients(clients, size)
    owner = np.empty(size, dtype=np.int64)
    owner[rng.permutation(size)] = np.arange(size, dtype=np.int64) % clients
    return _parts(owner, clients)


def dirichlet(
    labels: NDArray[Any], clients: int, alpha: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], ...]:
    """Deal each label out in proportions drawn from Dir(alpha): label skew, and unequal sizes with it.

    For each label k a vector p_k ~ Dir_clients(alpha, ..., alpha) is drawn, and client j gets the share
    p_kj of the examples of k, to within one example. Large alpha: everyone sees the same mix. Small
    alpha: each label sits with few clients.

    This is the variant of Yurochkin et al., one draw per *label* over the clients. Hsu et al. draw the
    other way round, one mix of labels per *client*, and give every client the same number of examples.

    Guarantees: as the module's; any finite alpha above 0 works. A client that the draw leaves empty gets
    one example, picked by ``rng``, from whoever then holds most (the first such client on a tie); nothing
    is ever drawn again, so the time taken is bounded. With few examples per client this evens sizes out.

    Args:
        labels: shape (size,), integers or strings.
        clients: number of clients, from 1 to ``size``.
        alpha: concentration, above 0.
        rng: where chance comes from.

    Returns:
        One sorted index array per client.

    Raises:
        ConfigError: ``federation.clients`` or ``data.alpha`` is out of range.

    Reference: Yurochkin et al., arXiv:1905.12022 (heterogeneous partition); compare Hsu et
    al., arXiv:1909.06335.

    >>> labels = np.repeat([0, 1, 2], 100)
    >>> parts = dirichlet(labels, 4, 1e-3, np.random.default_rng(0))
    >>> sum(part.size for part in parts), min(part.size for part in parts) >= 1
    (300, True)
    """
    size = len(labels)
    _check_clients(clients, size)
    _check_alpha(alpha)
    order, starts = _by_label(labels, rng)
    owner = np.empty(size, dtype=np.int64)
    for start, stop in pairwise(starts.tolist()):
        counts = _apportion(_dirichlet_draw(clients, alpha, rng), stop - start)
        owner[order[start:stop]] = np.repeat(np.arange(clients, dtype=np.int64), counts)
    return _parts(_fill_empty(owner, clients, rng), clients)


def shards(
    labels: NDArray[Any], clients: int, labels_per_client: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], ...]:
    """Sort by label, cut into ``clients * labels_per_client`` shards, give each client that many at random.

    Guarantees: as the module's; shard sizes differ by at most one, whether or not the number of examples
    divides. Where every label's count is a multiple of the shard size, a client sees at most
    ``labels_per_client`` labels; otherwise a shard may straddle two labels or more.

    Args:
        labels: shape (size,), integers or strings.
        clients: number of clients, from 1 to ``size``.
        labels_per_client: shards each client gets, at least 1.
        rng: where chance comes from.

    Returns:
        One sorted index array per client.

    Raises:
        ConfigError: ``federation.clients`` is out of range, or ``data.labels-per-client`` is below 1 or
            asks for more shards than there are examples.

    Reference: McMahan et al., arXiv:1602.05629, section 3, "Non-IID" (200 shards of 300, 2 a client).

    >>> labels = np.repeat([0, 1, 2, 3], 30)
    >>> parts = shards(labels, 6, 2, np.random.default_rng(0))
    >>> max(np.unique(labels[part]).size for part in parts) <= 2
    True
    """
    size = len(labels)
    _check_clients(clients, size)
    if not 1 <= labels_per_client <= size // clients:
        reason = (
            f"{clients} clients with {labels_per_client} shards each cannot share {size} examples;"
            f" choose from 1 to {size // clients}"
        )
        raise ConfigError("data.labels-per-client", reason)
    order, _ = _by_label(labels, rng)
    count = clients * labels_per_client
    shard_sizes = np.diff(np.arange(count + 1, dtype=np.int64) * size // count)
    shard_owner = rng.permutation(count) // labels_per_client
    owner = np.empty(size, dtype=np.int64)
    owner[order] = np.repeat(shard_owner, shard_sizes)
    return _parts(owner, clients)


def quantity(size: int, clients: int, alpha: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """Deal the examples out at random in unequal numbers: the share of each client is drawn from Dir(alpha).

    Guarantees: as the module's; labels stay IID. A client that the draw leaves empty is given one example
    as in :func:`dirichlet`.

    Args:
        size: number of examples.
        clients: number of clients, from 1 to ``size``.
        alpha: concentration, above 0; large means nearly equal sizes.
        rng: where chance comes from.

    Returns:
        One sorted index array per client.

    Raises:
        ConfigError: ``federation.clients`` or ``data.alpha`` is out of range.

    Reference: Li et al., arXiv:2102.02079, "quantity skew".

    >>> sorted(part.size for part in quantity(100, 4, 1e6, np.random.default_rng(0)))
    [25, 25, 25, 25]
    """
    _check_clients(clients, size)
    _check_alpha(alpha)
    counts = _apportion(_dirichlet_draw(clients, alpha, rng), size)
    owner = np.empty(size, dtype=np.int64)
    owner[rng.permutation(size)] = np.repeat(np.arange(clients, dtype=np.int64), counts)
    return _parts(_fill_empty(owner, clients, rng), clients)


def natural(groups: NDArray[Any]) -> tuple[NDArray[np.int64], ...]:
    """Give each natural owner (writer, hospital, machine) its own examples.

    Guarantees: as the module's; one client per distinct id, in sorted order of id. No chance is involved.

    Args:
        groups: shape (size,), the owner's id of each example.

    Returns:
        One sorted index array per distinct id.

    >>> [part.tolist() for part in natural(np.array(["b", "a", "b"]))]
    [[1], [0, 2]]
    """
    ids, owner = np.unique(groups, return_inverse=True)
    return _parts(owner.reshape(-1).astype(np.int64), ids.size)


def partition(
    scheme: str,
    *,
    clients: int,
    size: int,
    labels: NDArray[Any] | None,
    groups: NDArray[Any] | None,
    alpha: float,
    labels_per_client: int,
    seed: SeedTree,
) -> tuple[NDArray[np.int64], ...]:
    """Deal ``size`` examples out by the scheme that ``data.partition`` names.

    Guarantees: as the module's; the same arguments give the same parts.

    Args:
        scheme: one of ``SCHEMES``.
        clients: number of clients, from 1 to ``size``.
        size: number of examples.
        labels: shape (size,), the class of each example; ``None``, or anything but one class per example
            (real-valued targets, masks), where the task has none.
        groups: shape (size,), the natural owner of each example, or ``None`` where the task has none.
        alpha: for ``dirichlet`` and ``quantity``.
        labels_per_client: for ``shards``.
        seed: the node of the run's seed tree that belongs to the data.

    Returns:
        One sorted index array per client.

    Raises:
        ConfigError: carries the key: ``data.partition`` (unknown, or needs labels or ids that are not
            there), ``federation.clients``, ``data.alpha`` or ``data.labels-per-client``.
        TaskError: labels or groups are not as many as the examples.

    >>> from fedlearn.sources import SeedTree
    >>> parts = partition("iid", clients=2, size=5, labels=None, groups=None, alpha=0.5,
    ...                   labels_per_client=2, seed=SeedTree.root(0))
    >>> [part.size for part in parts]
    [3, 2]
    """
    if scheme not in SCHEMES:
        reason = f"unknown scheme {scheme!r}; choose one of {', '.join(SCHEMES)}"
        raise ConfigError("data.partition", reason, nearest(scheme, SCHEMES))
    classes = labels if labels is not None and _are_classes(labels) else None
    if (scheme in _NEEDS_LABELS and classes is None) or (scheme == "natural" and groups is None):
        raise _missing(scheme, has_labels=classes is not None, has_groups=groups is not None)
    _check_length("labels", labels, size)
    _check_length("natural ids", groups, size)
    if scheme == "natural" and groups is not None:
        parts = natural(groups)
        if clients != len(parts):
            reason = f"the data has {len(parts)} natural ids; set federation.clients = {len(parts)}"
            raise ConfigError("federation.clients", reason)
        return parts
    rng = seed.child("partition").generator()
    if scheme == "dirichlet" and classes is not None:
        return dirichlet(classes, clients, alpha, rng)
    if scheme == "shards" and classes is not None:
        return shards(classes, clients, labels_per_client, rng)
    if scheme == "quantity":
        return quantity(size, clients, alpha, rng)
    return iid(size, clients, rng)


def label_counts(parts: Sequence[NDArray[np.int64]], labels: NDArray[Any], num_labels: int) -> NDArray[np.int64]:
    """Count the examples of each label that each client holds.

    Args:
        parts: one index array per client.
        labels: shape (size,), integers in [0, num_labels).
        num_labels: number of labels, the absent ones included.

    Returns:
        Counts, shape (clients, num_labels).

    Raises:
        TaskError: a label is outside [0, num_labels) or not an integer.

    >>> label_counts([np.array([0, 1]), np.array([2])], np.array([0, 2, 2]), 3).tolist()
    [[1, 0, 1], [0, 0, 1]]
    """
    if labels.dtype.kind not in "iub":
        raise TaskError(f"labels are of type {labels.dtype}; counting them needs integers")
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if labels.size and (low < 0 or high >= num_labels):
        raise TaskError(f"labels run from {low} to {high}; with {num_labels} labels they must be 0 to {num_labels - 1}")
    sizes = np.array([part.size for part in parts], dtype=np.int64)
    client = np.repeat(np.arange(sizes.size, dtype=np.int64), sizes)
    index = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    cell = client * num_labels + labels[index].astype(np.int64)
    counts = np.bincount(cell, minlength=sizes.size * num_labels)
    return counts.astype(np.int64).reshape(sizes.size, num_labels)


def _check_clients(clients: int, size: int) -> None:
    """Raise unless every client can get an example."""
    if clients < 1:
        raise ConfigError("federation.clients", f"{clients} is not a number of clients; at least 1 is needed")
    if clients > size:
        reason = f"{clients} clients cannot share {size} examples; set at most {size}"
        raise ConfigError("federation.clients", reason)


def _check_alpha(alpha: float) -> None:
    """Raise unless ``alpha`` is a concentration."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError("data.alpha", f"{alpha} is out of range; a finite number above 0 is needed")


def _check_length(noun: str, values: NDArray[Any] | None, size: int) -> None:
    """Raise unless there is one value per example, or none at all."""
    if values is not None and len(values) != size:
        raise TaskError(f"the task has {size} examples but {len(values)} {noun}")


def _are_classes(labels: NDArray[Any]) -> bool:
    """Return whether ``labels`` names one class per example, rather than a real number or a mask."""
    return labels.ndim == 1 and labels.dtype.kind not in "fc"


def _missing(scheme: str, *, has_labels: bool, has_groups: bool) -> ConfigError:
    """Return the error for a scheme that needs what the task does not have."""
    lacks = "natural ids" if scheme == "natural" else "class labels"
    works = [
        name for name in SCHEMES if (name not in _NEEDS_LABELS or has_labels) and (name != "natural" or has_groups)
    ]
    reason = f"{scheme!r} needs {lacks}, and the task has none; {', '.join(works)} would work"
    return ConfigError("data.partition", reason)


def _by_label(labels: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the examples sorted by label, shuffled within each, and the bounds of each label."""
    _, code = np.unique(labels, return_inverse=True)
    shuffled = rng.permutation(code.size)
    order = shuffled[np.argsort(code.reshape(-1)[shuffled], kind="stable")].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(code.reshape(-1)))]).astype(np.int64)
    return order, starts


def _dirichlet_draw(clients: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw from Dir(alpha, ..., alpha), in logarithms so that a tiny alpha never ends in 0/0.

    A Gamma(a) variable is a Gamma(a + 1) variable times U**(1/a), and -log U is exponential
    (Marsaglia and Tsang, 2000).
    """
    shape = max(alpha, _SMALLEST_ALPHA)
    log_gamma = np.log(rng.standard_gamma(shape + 1.0, size=clients))
    log_gamma -= rng.standard_exponential(size=clients) / shape
    weight = np.exp(log_gamma - log_gamma.max())
    share: NDArray[np.float64] = weight / weight.sum()
    return share


def _apportion(share: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Return whole numbers that sum to ``total``, each within one of ``share * total``."""
    cuts = np.rint(np.cumsum(share) * total).astype(np.int64)
    cuts[-1] = total
    return np.diff(np.minimum(cuts, total), prepend=0)


def _fill_empty(owner: NDArray[np.int64], clients: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return ``owner`` with one example moved to each client that has none, always from the largest."""
    sizes = np.bincount(owner, minlength=clients)
    empty = np.flatnonzero(sizes == 0)
    if not empty.size:
        return owner
    shuffled = rng.permutation(owner.size)
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]
    ends = np.cumsum(sizes)
    heap = [(-int(count), client) for client, count in enumerate(sizes) if count > 1]
    heapq.heapify(heap)
    filled = owner.copy()
    for client in empty:
        held, donor = heap[0]
        ends[donor] -= 1
        filled[grouped[ends[donor]]] = client
        heapq.heapreplace(heap, (held + 1, donor))
    return filled


def _parts(owner: NDArray[np.int64], clients: int) -> tuple[NDArray[np.int64], ...]:
    """Return the sorted indices of each client, from the client of each index."""
    order = np.argsort(owner, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(owner, minlength=clients)).tolist()
    return tuple(order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
