"""A hash over many entries of which any one can be shown to be in it, by the hashes beside its way to the root.

Reference: RFC 6962, section 2.1 (leaves and inner nodes have tags of their own).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlearn.secagg.keys import tagged_hash

__all__ = ["MerkleTree", "root_of"]


class MerkleTree:
    """The tree over a list of leaf hashes; an odd one at the end of a level moves up as it is.

    >>> tree = MerkleTree([b"a", b"b", b"c"])
    >>> root_of(b"c", 2, 3, tree.path(2)) == tree.root
    True
    """

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ValueError("a tree has at least one leaf")
        self._levels = [list(leaves)]
        while len(self._levels[-1]) > 1:
            level = self._levels[-1]
            above = [_inner(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
            self._levels.append(above + level[len(level) - len(level) % 2 :])

    @property
    def root(self) -> bytes:
        """The hash over all leaves."""
        return self._levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """Return the hashes beside the way from a leaf to the root."""
        found = []
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):
                found.append(level[index ^ 1])
            index //= 2
        return tuple(found)


def root_of(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """Return the root of a tree of ``size`` leaves that has ``leaf`` at ``index``; ``None``: the path does not fit."""
    hashes = list(path)
    found = leaf
    while size > 1:
        if index ^ 1 < size:
            if not hashes:
                return None
            beside = hashes.pop(0)
            found = _inner(beside, found) if index & 1 else _inner(found, beside)
        index, size = index // 2, (size + 1) // 2
    return None if hashes else found


def _inner(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return tagged_hash("merkle-node", left, right)
