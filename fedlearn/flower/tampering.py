"""A reply that is damaged or falsified on its way: between the client that sent it and the server's own checks."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from fedlearn.flower.faults import Fate

__all__ = ["payload_bytes", "tampered"]


def tampered(reply: Message, fate: Fate) -> Message:
    """Return the reply as it arrives: its arrays changed as ``fate`` has it, the rest as it was sent.

    Guarantees: ``reply`` is not changed; an error reply, and one without arrays, arrives as it was sent. Whole numbers
    stay what they are: none of them is NaN.
    """
    if not fate.attack or reply.has_error():
        return reply
    content = RecordDict(dict(reply.content))
    for name, record in reply.content.array_records.items():
        content[name] = ArrayRecord({key: Array(_changed(array.numpy(), fate)) for key, array in record.items()})
    arrived: Message = Message(content, metadata=reply.metadata)  # type: ignore[call-overload]
    return arrived


def _changed(array: NDArray[Any], fate: Fate) -> NDArray[Any]:
    """Return one array as it arrives."""
    if fate.attack == "wrong-shape":
        flat = array.reshape(-1)
        shapes = (flat[:-1], np.append(flat, flat[-1:]), flat[np.newaxis, :], np.zeros((0,), array.dtype))
        return np.ascontiguousarray(shapes[int(fate.where * len(shapes))])
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if fate.attack == "nan":
        changed = array.copy()
        changed.reshape(-1)[int(fate.where * changed.size)] = np.nan
        return changed
    with np.errstate(over="ignore"):  # infinity is for the server to find
        scaled: NDArray[Any] = (array * array.dtype.type(fate.factor)).astype(array.dtype)
    return scaled


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes that make a message long: numbers of arrays, and the bodies of secure aggregation.

    What is around them (names, headers, the round's plan) is some hundred bytes and not counted, so that a client's
    time on a link is known before it has trained: its update is as long as the model.
    """
    arrays = [array for record in content.array_records.values() for array in record.values()]
    values = [value for record in content.config_records.values() for value in record.values()]
    numbers = sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in arrays)
    return numbers + sum(len(value) for value in values if isinstance(value, bytes))
