"""Who a client is under secure aggregation: by its owner's node configuration on a device, by a folder in a simulation.

A device takes none of it from a message: its key, the list of devices, the registry that signed the list, the server it
was enrolled with, and its owner's floors are on the device.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedlearn.errors import MissingError, ReplyError
from fedlearn.federation.messages import FailureCode, RoundPlan
from fedlearn.files import data_home
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.keys import KEY_BYTES, SigningKey
from fedlearn.secagg.messages import MODES
from fedlearn.secagg.policy import ClientPolicy
from fedlearn.secagg.simulated import SimulatedIdentities
from fedlearn.secagg.vault import FileVault, Vault

__all__ = ["SecaggDevice", "device_folder", "is_device", "masks_only", "secagg_device"]

_FLOORS = (
    "least-cohort",
    "least-colluding",
    "least-noise",
    "least-survivors",
    "most-sessions",
    "secagg-mode",
)
"""What an owner may ask for in the node configuration."""

_KNOWN = (
    *("allow-list", "data-path", "delta", "device-key", "ledger-folder", "ledger-path", "max-epsilon"),
    *("num-partitions", "partition-id", "privacy-unit", "registry-key", "server-key", "task", "vault"),
)
"""What else may be in it."""

_SIMULATED = ClientPolicy(longest_s=float("inf"), least_colluding=0.0)


@dataclass(frozen=True, kw_only=True)
class SecaggDevice:
    """A client's identity and what it checks a session by.

    Attributes:
        identity: its key.
        allow_list: who may take part, by the registry.
        server_key: the public key of the server it was enrolled with.
        policy: its owner's floors.
        vault: where a session lies between two legs.
        simulated: whether it is one of many on this machine; time is then each client's own.
    """

    identity: SigningKey
    allow_list: AllowList
    server_key: bytes
    policy: ClientPolicy
    vault: Vault
    simulated: bool

    def now_s(self, deadline_s: int) -> float:
        """Return the time an offer is checked against: on a device the clock's, else a time before the deadline."""
        return min(time.time(), deadline_s - 1.0) if self.simulated else time.time()


def is_device(node_config: Mapping[str, Any]) -> bool:
    """Return whether a node holds data of its own, which its owner has told it the path of."""
    return "data-path" in node_config


def device_folder(node_config: Mapping[str, Any]) -> Path:
    """Return a device's own folder, named by its data: a server gives out the node's id, and may give another."""
    held = hashlib.sha256(str(Path(str(node_config["data-path"])).resolve()).encode()).hexdigest()[:16]
    return data_home() / "clients" / held


def masks_only(node_config: Mapping[str, Any]) -> bool:
    """Return whether a device's owner gave it a key: it then answers nothing that is not masked."""
    return "device-key" in node_config


def secagg_device(plan: RoundPlan, context: Context, client: int) -> SecaggDevice:
    """Return who this client is.

    Raises:
        ReplyError: ``refused`` where a device has no key, or its configuration cannot be used.
    """
    told = context.node_config
    if not is_device(told):
        return _simulated(plan, client)
    if not masks_only(told):
        reason = "this device has no device-key, allow-list, registry-key and server-key in its node configuration"
        raise ReplyError(FailureCode.REFUSED, reason)
    if plan.config.privacy.unit == "client" and "least-noise" not in told:
        reason = (
            "this device's owner has set no least-noise, the least that hides it in a sum, in its node configuration"
        )
        raise ReplyError(FailureCode.REFUSED, reason)
    try:
        registry = _public(told, "registry-key")
        return SecaggDevice(
            identity=SigningKey.read(Path(str(told["device-key"]))),
            allow_list=AllowList.read(Path(str(told.get("allow-list", ""))), registry),
            server_key=_public(told, "server-key"),
            policy=_policy(told),
            vault=FileVault(_vault_folder(told)),
            simulated=False,
        )
    except (MissingError, ValueError) as error:
        raise ReplyError(FailureCode.REFUSED, f"this device's node configuration cannot be used: {error}") from error


def _simulated(plan: RoundPlan, client: int) -> SecaggDevice:
    """Return a virtual client."""
    if not plan.identities:
        raise ReplyError(FailureCode.BAD_REQUEST, "a simulation's plan names the folder of its clients' keys")
    identities = _identities(plan.identities)
    return SecaggDevice(
        identity=identities.device(client),
        allow_list=identities.allow_list(plan.config.federation.clients),
        server_key=identities.server.public,
        policy=_SIMULATED,
        vault=identities.vault(client),
        simulated=True,
    )


@lru_cache(maxsize=2)
def _identities(folder: str) -> SimulatedIdentities:
    """Return the keys of a simulation, read once a process."""
    try:
        return SimulatedIdentities(Path(folder))
    except MissingError as error:
        raise ReplyError(FailureCode.BAD_REQUEST, str(error)) from error


def _policy(told: Mapping[str, Any]) -> ClientPolicy:
    """Return the owner's floors.

    Raises:
        ValueError: one of them is no number, or out of range.
    """
    if unknown := sorted(set(told) - set(_FLOORS) - set(_KNOWN)):  # a floor that is misspelt would be none
        raise ValueError(f"there is no {unknown[0]} in a node configuration; there are {', '.join(_FLOORS)}")
    wanted = str(told.get("secagg-mode", "active"))
    if wanted not in MODES:
        raise ValueError(f"secagg-mode must be one of {', '.join(MODES)}, got {wanted!r}")
    least = ClientPolicy()
    return ClientPolicy(
        modes=("active",) if wanted == "active" else MODES,
        least_cohort=_count(told, "least-cohort", least.least_cohort),
        least_survivors=_count(told, "least-survivors", least.least_survivors),
        least_colluding=_finite(told, "least-colluding", least.least_colluding),
        least_noise_multiplier=_finite(told, "least-noise", least.least_noise_multiplier),
        most_sessions=_count(told, "most-sessions", 0) if "most-sessions" in told else None,
    )


def _count(told: Mapping[str, Any], name: str, default: int) -> int:
    """Return a whole number of the node configuration."""
    value = _finite(told, name, default)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {told.get(name)}")
    return int(value)


def _finite(told: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number of the node configuration, which is finite and not negative."""
    value = float(told.get(name, default))
    if not 0 <= value < math.inf:  # NaN is below no floor, and so would be none
        raise ValueError(f"{name} must be a number from 0 on, got {told.get(name)}")
    return value


def _public(told: Mapping[str, Any], name: str) -> bytes:
    """Return a public key of the node configuration, which is written in hexadecimal."""
    key = bytes.fromhex(str(told.get(name, "")))
    if len(key) != KEY_BYTES:
        raise ValueError(f"{name} must be 64 hexadecimal digits")
    return key


def _vault_folder(told: Mapping[str, Any]) -> Path:
    """Return where a device keeps its sessions' keys."""
    if "vault" in told:
        return Path(str(told["vault"]))
    return device_folder(told) / "vault"
