"""Secrets out of shares, some of which may be wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedlearn.secagg.derivation import seed_commitment
from fedlearn.secagg.errors import ShareReconstructionError
from fedlearn.secagg.keys import AgreementKey
from fedlearn.secagg.members import Member
from fedlearn.secagg.shamir import PRIME, combine, lagrange_at_zero, share_from_bytes
from fedlearn.secagg.topology import Topology

__all__ = ["Reconstruction"]

_MOST_SUBSETS = 300
"""How many sets of shares are tried for one secret before it is given up."""


class Reconstruction:
    """Secrets out of shares; Lagrange coefficients are computed once for each set of holders."""

    def __init__(
        self,
        members: Sequence[Member],
        topology: Topology,
        responders: Sequence[int],
        complaints: list[ShareReconstructionError],
    ) -> None:
        self._members, self._topology, self._complaints = members, topology, complaints
        self._responders = set(responders)
        self._coefficients: dict[tuple[int, ...], tuple[int, ...]] = {}

    def seed(self, owner: int) -> bytes:
        """Return b of a client that survived."""
        header = self._members[owner].header
        commitment = b"" if header is None else header.commitment
        return self._secret(owner, lambda secret: seed_commitment(secret) == commitment)

    def mask_key(self, owner: int) -> bytes:
        """Return the private mask key of a client that was lost."""
        public = self._members[owner].advertisement.mask_key
        return self._secret(owner, lambda secret: AgreementKey(secret).public == public)

    def _secret(self, owner: int, is_right: Callable[[bytes], bool]) -> bytes:
        """Return the secret that ``is_right``, from whichever t shares give it."""
        shares = self._shares(owner)
        threshold = self._topology.threshold
        if len(shares) < threshold:
            raise ShareReconstructionError(owner, f"{len(shares)} shares came, and {threshold} are needed")
        for holders in itertools.islice(_subsets(sorted(shares), threshold), _MOST_SUBSETS):
            coefficients = self._lagrange(holders)
            secret = combine([shares[holder] for holder in holders], coefficients)
            if secret is not None and is_right(secret):
                if holders != tuple(sorted(shares))[:threshold]:
                    self._blame(owner, shares, holders)
                return secret
        raise ShareReconstructionError(owner, "no set of the shares that were sent gives its secret")

    def _blame(self, owner: int, shares: Mapping[int, int], right: tuple[int, ...]) -> None:
        """Note every holder whose share is not on the polynomial of those that gave the secret."""
        for holder in sorted(set(shares) - set(right)):
            there = lagrange_at_zero([(other - holder) % PRIME for other in right])  # at this holder's own point
            if (
                sum(shares[other] * weight for other, weight in zip(right, there, strict=True)) % PRIME
                != shares[holder]
            ):
                reason = f"client {holder} sent a wrong share of its secret"
                self._complaints.append(ShareReconstructionError(owner, reason, holder=holder))

    def _shares(self, owner: int) -> Mapping[int, int]:
        """Return holder to share."""
        found = {}
        for holder in self._topology.holders(owner):
            shares = self._members[holder].shares if holder in self._responders else None
            if shares is not None and owner in shares:
                found[holder] = share_from_bytes(shares[owner])
        return found

    def _lagrange(self, holders: tuple[int, ...]) -> tuple[int, ...]:
        """Return the coefficients of a set of holders."""
        if holders not in self._coefficients:
            self._coefficients[holders] = lagrange_at_zero([holder + 1 for holder in holders])
        return self._coefficients[holders]


def _subsets(holders: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Yield sets of ``size`` holders: those in a row on a circle, which leave any one out, then without a pair."""
    count = len(holders)
    for start in range(count if count > size else 1):
        yield tuple(sorted(holders[(start + step) % count] for step in range(size)))
    if count - 2 >= size:
        for pair in itertools.combinations(holders, 2):
            yield tuple([holder for holder in holders if holder not in pair][:size])
