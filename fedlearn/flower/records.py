"""Between fedlearn's values and Flower's records, with every byte from outside checked before it is believed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray

from fedlearn.arrays import ParamSpec, Vector
from fedlearn.errors import ReplyError
from fedlearn.federation.groups import check_group_reply
from fedlearn.federation.messages import (
    EvaluateReply,
    Failure,
    FailureCode,
    GroupReply,
    LegReply,
    LegRequest,
    Reply,
    Request,
    RoundPlan,
    TrainReply,
    check_evaluate_reply,
    check_train_reply,
    reply_numbers,
)

__all__ = [
    "REFUSAL",
    "evaluate_reply_records",
    "group_records",
    "group_reply_records",
    "leg_records",
    "leg_reply_records",
    "read_array",
    "read_group",
    "read_group_reply",
    "read_leg",
    "read_leg_reply",
    "read_reply",
    "read_vector",
    "refusal",
    "request_records",
    "single_bytes",
    "size_bytes",
    "train_reply_records",
    "vector_record",
]

log = logging.getLogger("fedlearn.server")

REFUSAL = 100
"""Flower's error code under which our clients send a ``FailureCode``; Flower's own end below 10."""

_STYPE = "numpy.ndarray"
_HEADER_LIMIT = 4096
_MAGIC = b"\x93NUMPY\x01\x00"
_FLOWER_CODES = {
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: FailureCode.TRAINING_FAILED,
    ErrorCode.MESSAGE_UNAVAILABLE: FailureCode.NO_REPLY,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: FailureCode.NO_REPLY,
}


def request_records(vector: ArrayRecord, plan: RoundPlan) -> RecordDict:
    """Return the content of a ``train`` or ``evaluate`` message; ``vector`` may be shared between messages."""
    return RecordDict({"model": vector, "round": ConfigRecord({"plan": plan.to_json()})})


def leg_records(request: LegRequest, vector: ArrayRecord | None) -> RecordDict:
    """Return the content of a ``train.<leg>`` message; ``vector`` may be shared between messages."""
    records = RecordDict({"leg": ConfigRecord({"body": request.body})})
    records["round"] = ConfigRecord({"plan": request.plan.to_json()})
    if vector is not None:
        records["model"] = vector
    return records


def read_leg(content: RecordDict, *, model: bool) -> tuple[bytes, str, ArrayRecord | None]:
    """Return the body, the plan's text and, where the leg carries it, the model of a ``train.<leg>`` message.

    Raises:
        ReplyError: ``bad-request``.
    """
    expected = {"leg", "round"} | ({"model"} if model else set())
    body = content.config_records["leg"].get("body") if "leg" in content.config_records else None
    plan = content.config_records["round"].get("plan") if "round" in content.config_records else None
    if set(content) != expected or not isinstance(body, bytes) or not isinstance(plan, str):
        raise ReplyError(FailureCode.BAD_REQUEST, f"expected the records {sorted(expected)}")
    return body, plan, content.array_records["model"] if model else None


def leg_reply_records(body: bytes) -> RecordDict:
    """Return the content of an answer to a leg: the protocol's bytes, and nothing else."""
    return RecordDict({"leg": ConfigRecord({"body": body})})


def read_leg_reply(message: Message, client: int, download_bytes: int) -> LegReply | Failure:
    """Return what a client answered to a leg; its bytes are for the session to check."""
    if message.has_error():
        return _read_error(message.error, client, download_bytes)
    content, upload_bytes = message.content, size_bytes(message.content)
    record = content.get("leg")
    body = record.get("body") if isinstance(record, ConfigRecord) and set(record) == {"body"} else None
    if set(content) != {"leg"} or not isinstance(body, bytes):
        return Failure(
            client=client, code=FailureCode.BAD_REPLY, upload_bytes=upload_bytes, download_bytes=download_bytes
        )
    return LegReply(client=client, body=body, upload_bytes=upload_bytes, download_bytes=download_bytes)


def group_records(request: Request, vector: ArrayRecord, members: Sequence[int], trainer: str) -> RecordDict:
    """Return the content of a ``train.group`` message; ``vector`` may be shared between messages."""
    records = request_records(vector, request.plan)
    records["group"] = ConfigRecord({"members": list(members), "trainer": trainer})
    return records


def read_group(content: RecordDict) -> tuple[list[int], str]:
    """Return the members and the trainer in a ``train.group`` message.

    Raises:
        ReplyError: ``bad-request``.
    """
    group = content.config_records.get("group")
    members, trainer = (None, None) if group is None else (group.get("members"), group.get("trainer"))
    if not isinstance(members, list) or not isinstance(trainer, str):
        raise ReplyError(FailureCode.BAD_REQUEST, "expected the record group, with its members and trainer")
    return [int(client) for client in members], trainer


def group_reply_records(total: NDArray[Any], counted: Mapping[str, Any]) -> RecordDict:
    """Return the content of a group's answer."""
    return RecordDict(
        {"sum": vector_record("sum", total), "counted": ConfigRecord({"json": json.dumps(dict(counted))})}
    )


def single_bytes(request: Request, vector: ArrayRecord, spec: ParamSpec) -> tuple[int, int]:
    """Return the bytes of one client's own answer to ``request`` and of the message: what a group's members would send.

    Args:
        request: of one client.
        vector: the model that is sent, as a record: an update is as long.
        spec: the model's description.
    """
    numbers = dict.fromkeys(reply_numbers(request.plan.config), 0)
    answer = train_reply_records(np.zeros(0, dtype=spec.dtype), numbers)
    answer["update"] = ArrayRecord({"update": vector["vector"]})
    return size_bytes(answer), size_bytes(request_records(vector, request.plan))


def read_group_reply(
    message: Message, members: Sequence[int], plan: RoundPlan, spec: ParamSpec, sizes: tuple[int, int]
) -> GroupReply | None:
    """Return what a group answered, or ``None`` where it is of no use and its members must be asked one by one.

    Args:
        message: the answer.
        members: who was asked.
        plan: what was asked for.
        spec: the model's description.
        sizes: ``single_bytes`` of a member.
    """
    if message.has_error():
        log.warning(
            "asking %d clients one by one (%s): in one computation %s", len(members), members[0], message.error.reason
        )
        return None
    clipped = plan.bound_l2 is not None
    size, dtype = (spec.trainable_size, np.dtype(np.float64)) if clipped else (spec.size, spec.dtype)
    try:
        counted = json.loads(str(message.content.config_records["counted"]["json"]))
        total = read_array(message.content.array_records["sum"]["sum"], size, dtype)
        return check_group_reply(members, total, counted, plan=plan, upload_bytes=sizes[0], download_bytes=sizes[1])
    except (ReplyError, KeyError, TypeError, ValueError) as error:
        log.warning("asking the members of a group one by one: %s", error)
        return None


def vector_record(name: str, vector: Vector) -> ArrayRecord:
    """Return a record with one array, in NumPy's own format."""
    flat = np.ascontiguousarray(vector)
    data = b"".join((_header(flat.size, flat.dtype), flat.data))  # one copy; numpy.save makes three
    return ArrayRecord({name: Array(str(flat.dtype), flat.shape, _STYPE, data)})


def _header(size: int, dtype: np.dtype[Any]) -> bytes:
    """Return what NumPy writes before the numbers of a vector: version 1.0, padded to 64 bytes."""
    text = _described(size, dtype)
    length = -(-(len(_MAGIC) + 2 + len(text) + 1) // 64) * 64 - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def _described(size: int, dtype: np.dtype[Any]) -> bytes:
    """Return the only description of a vector that there can be."""
    return f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({size},), }}".encode()


def read_vector(array: Array, spec: ParamSpec) -> NDArray[Any]:
    """Return the vector in ``array``, checked to be of ``spec``'s shape and type.

    Raises:
        ReplyError: ``bad-reply``.
    """
    return read_array(array, spec.size, spec.dtype)


def read_array(array: Array, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the vector in ``array``, checked to be of this length and type before any memory is taken for it.

    The only header there can be is known, so it is compared: NumPy's own parser of untrusted headers raises more than
    it says (tokenize.TokenError, IndexError).

    Raises:
        ReplyError: ``bad-reply``.
    """
    expected = size * dtype.itemsize
    if (
        array.stype != _STYPE
        or tuple(array.shape) != (size,)
        or array.dtype != str(dtype)
        or len(array.data) > expected + _HEADER_LIMIT
    ):
        raise ReplyError(FailureCode.BAD_REPLY, f"expected a {dtype} array of shape ({size},)")
    start = 10 + int.from_bytes(array.data[8:10], "little")
    if (
        array.data[:8] != _MAGIC
        or array.data[10:start].rstrip(b" \n") != _described(size, dtype)
        or len(array.data) - start != expected
    ):
        raise ReplyError(FailureCode.BAD_REPLY, "the array's header is not the one that was agreed")
    return np.frombuffer(array.data, dtype=dtype, offset=start)


def train_reply_records(vector: Vector, numbers: Mapping[str, int | float]) -> RecordDict:
    """Return the content of a client's answer to ``train``; without numbers, the update is all there is."""
    records = RecordDict({"update": vector_record("update", vector)})
    if numbers:
        records["metrics"] = MetricRecord(dict(numbers))
    return records


def evaluate_reply_records(numbers: Mapping[str, int | float]) -> RecordDict:
    """Return the content of a client's answer to ``evaluate``."""
    return RecordDict({"metrics": MetricRecord(dict(numbers))})


def refusal(code: str, incident: str, reply_to: Message) -> Message:
    """Return an error reply that carries a code and the incident's number in the client's own log, and no text."""
    return Message(Error(code=REFUSAL, reason=f"{code}:{incident}"), reply_to=reply_to)


def read_reply(message: Message, request: Request, spec: ParamSpec, download_bytes: int) -> Reply:
    """Return what a client answered, checked in every part; a bad answer is that client's ``Failure``."""
    if message.has_error():
        return _read_error(message.error, request.client, download_bytes)
    upload_bytes = size_bytes(message.content)
    try:
        return _read_content(message.content, request, spec, upload_bytes, download_bytes)
    except ReplyError as error:
        return Failure(
            client=request.client,
            code=FailureCode(error.code),
            upload_bytes=upload_bytes,
            download_bytes=download_bytes,
        )


def _read_content(
    content: RecordDict, request: Request, spec: ParamSpec, upload_bytes: int, download_bytes: int
) -> TrainReply | EvaluateReply:
    """Return the checked content of a reply."""
    trained = request.kind == "train"
    expected = ({"update"} if trained else set()) | (
        {"metrics"} if not trained or reply_numbers(request.plan.config) else set()
    )
    if set(content) != expected or not isinstance(content.get("metrics", MetricRecord()), MetricRecord):
        raise ReplyError(FailureCode.BAD_REPLY, f"expected the records {sorted(expected)}")
    numbers = dict(content.get("metrics", MetricRecord()))
    if request.kind == "evaluate":
        return check_evaluate_reply(
            request.client,
            numbers,
            plan=request.plan,
            upload_bytes=upload_bytes,
            download_bytes=download_bytes,
        )
    arrays = content["update"]
    if not isinstance(arrays, ArrayRecord) or set(arrays) != {"update"}:
        raise ReplyError(FailureCode.BAD_REPLY, "expected one array, update")
    return check_train_reply(
        request.client,
        {"update": read_vector(arrays["update"], spec)},
        numbers,
        plan=request.plan,
        spec=spec,
        upload_bytes=upload_bytes,
        download_bytes=download_bytes,
    )


def _read_error(error: Error, client: int, download_bytes: int) -> Failure:
    """Return a failure from an error reply; what it says is used only where it is one of our own words."""
    if error.code == REFUSAL:
        code, _, incident = (error.reason or "").partition(":")
        if code in set(FailureCode) and len(incident) <= 16 and incident.isalnum():
            return Failure(client=client, code=FailureCode(code), incident=incident, download_bytes=download_bytes)
        return Failure(client=client, code=FailureCode.BAD_REPLY, download_bytes=download_bytes)
    code_of_flower = _FLOWER_CODES.get(error.code, FailureCode.LOST)
    return Failure(client=client, code=code_of_flower, download_bytes=download_bytes)


def size_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's records, whatever is in them: it is asked before anything else is checked."""
    return sum(_record_bytes(record) for record in content.values())


def _record_bytes(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    """Return the bytes of a record; Flower's own count raises at an empty text, empty bytes and an empty list."""
    if not isinstance(record, ConfigRecord):
        return record.count_bytes()
    names = sum(len(name) for name, value in record.items() if not _is_counted(value))
    return names + ConfigRecord({name: value for name, value in record.items() if _is_counted(value)}).count_bytes()


def _is_counted(value: object) -> bool:
    """Return whether Flower counts a value's bytes."""
    return not isinstance(value, str | bytes | list) or bool(value)
