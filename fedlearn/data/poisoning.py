"""Data that a client has falsified, for simulations of such clients."""

from __future__ import annotations

from dataclasses import replace

from fedlearn.errors import TaskError
from fedlearn.learning.task import Examples

__all__ = ["flip_labels"]


def flip_labels(examples: Examples, classes: int) -> Examples:
    """Return the examples with their labels turned round: class k of K becomes K − 1 − k.

    Guarantees: done twice, it gives the labels that were there; the inputs and the argument are not touched.

    Args:
        examples: with targets that are classes.
        classes: K, how many there are.

    Raises:
        TaskError: the targets are no classes, or there are more of them.

    Reference: Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", arXiv:2007.08432, of labels
    that clients change.

    >>> import torch
    >>> flip_labels(Examples(torch.zeros(3, 1), torch.tensor([0, 1, 9])), 10).targets
    tensor([9, 8, 0])
    """
    labels = examples.labels()
    if labels is None:
        raise TaskError("labels can be turned round only where targets are classes, one integer an example")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise TaskError(f"labels go from {labels.min()} to {labels.max()}, which is not within {classes} classes")
    return replace(examples, targets=(classes - 1 - examples.targets).to(examples.targets.dtype))
