"""The graph of one session as it follows from its offer and its roster; nobody is told it, all compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedlearn.secagg.errors import GraphError
from fedlearn.secagg.graph import Graph, Ring, counts, graph_of, neighbours, ring_permutation
from fedlearn.secagg.messages import Offer

__all__ = ["Topology"]


@dataclass(frozen=True, slots=True)
class Topology:
    """Who is whose neighbour.

    Attributes:
        graph: n, k and t.
        ring: in which order the clients stand.
        least_survivors: below which a sum is not unmasked: on a sparse graph what its parameters hold for, so that no
            server can cut a stretch off the ring.
    """

    graph: Graph
    ring: Ring
    least_survivors: int

    @classmethod
    def of(cls, offer: Offer, clients: int, roster: bytes) -> Topology:
        """Return the graph of ``clients`` under the roster's hash.

        Raises:
            GraphError: no sparse graph holds for the offer's shares of colluding and lost clients.
        """
        colluding = counts(offer.cohort, offer.colluding, offer.dropping)[0]  # those who never came may all be honest
        return _topology(clients, roster, colluding, offer.dropping, offer.mode == "active")

    @property
    def clients(self) -> int:
        """How many clients there are: n."""
        return self.graph.n

    @property
    def degree(self) -> int:
        """How many neighbours each client has: k."""
        return self.graph.k

    @property
    def threshold(self) -> int:
        """How many shares rebuild a secret: t."""
        return self.graph.threshold

    def neighbours(self, index: int) -> Sequence[int]:
        """Return a client's neighbours, in ascending order."""
        return neighbours(self.graph, index, self.ring)

    def holders(self, index: int) -> Sequence[int]:
        """Return who holds shares of a client's secrets: its neighbours, and on the complete graph itself too.

        There a client that answers thus counts for its own seed as well, and "t of n answer" is all that is needed.
        """
        return range(self.clients) if self.graph.complete else self.neighbours(index)


@lru_cache(maxsize=8)
def _topology(clients: int, roster: bytes, colluding: int, dropping: float, active: bool) -> Topology:
    """Return a session's graph; the server and, in a simulation, every client ask for the same one."""
    try:
        _, dropped = counts(clients, 0.0, dropping)
        graph = graph_of(clients, corrupt=colluding, dropped=dropped, active=active)
    except ValueError as error:
        raise GraphError(str(error)) from error
    return Topology(graph, ring_permutation(clients, roster), 0 if graph.complete else clients - dropped)
