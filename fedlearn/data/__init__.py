"""The data of a simulation: who would hold what."""

from fedlearn.data.partition import (
    SCHEMES,
    dirichlet,
    iid,
    label_counts,
    natural,
    partition,
    quantity,
    shards,
)

__all__ = ["SCHEMES", "dirichlet", "iid", "label_counts", "natural", "partition", "quantity", "shards"]
