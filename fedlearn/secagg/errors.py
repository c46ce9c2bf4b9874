"""Every error of secure aggregation, one for each thing that can be wrong with a message.

::

    SecaggError
    ├── MalformedMessageError          bytes that are no message of the leg that is due
    ├── StageError                     a message that comes twice, too early or too late
    ├── OfferError                     leg 0: the client takes no part in the round
    │   ├── OfferSignatureError        not signed by the server this client knows
    │   ├── UnsupportedSuiteError      a suite, mode or rule this version does not have
    │   ├── PolicyViolationError       below a floor of the client's own, or a lane could overflow
    │   ├── ModelHashMismatchError     the model that came is not the one the offer names
    │   ├── ReplayError                a session this client has seen before
    │   ├── ParticipationLimitError    the client has taken part as often as its owner permits
    │   └── DeadlineError              the offer's deadline has passed, or is too far away
    ├── RosterError                    legs 1 and 2: who takes part
    │   ├── UnknownDeviceError         no device of the allow-list
    │   ├── BadAdvertisementError      the advertisement's signature does not hold, or a key is none
    │   ├── DuplicateDeviceError       one device twice
    │   ├── DuplicateKeyError          one key twice
    │   ├── ParamsMismatchError        made for another offer
    │   ├── RosterTamperedError        the client's own entry is not what it sent
    │   ├── CohortTooSmallError        fewer clients than agreed
    │   └── GraphError                 not the graph, or the threshold, that follows from the roster
    ├── ShareError                     legs 3 and 4: the secrets' shares
    │   ├── NotANeighbourError         from or for a client that is none
    │   ├── RosterInconsistentError    the bitmap of those that shared contradicts what came with it
    │   ├── BadShareSignatureError     the shares are not signed by who is said to have made them
    │   ├── ShareDecryptError          a share was altered on its way
    │   └── TooFewNeighboursError      fewer neighbours than the threshold shared
    ├── MaskedInputError               leg 5
    │   └── VectorLengthError          not a vector of the agreed length
    ├── SurvivorError                  legs 6 to 8: whose vectors are in the sum
    │   ├── SurvivorSubsetError        a survivor that had not shared
    │   ├── SelfNotSurvivorError       the client's own vector is said not to have come
    │   ├── TooFewSurvivorsError       fewer than agreed
    │   ├── SurvivorInconsistencyError another list than other clients were shown
    │   └── TooFewSignaturesError      fewer confirmations of the list than the threshold
    ├── ShareReconstructionError       a client's secret does not come out of its shares (carries whose)
    └── RoundAbortedError              too few clients are left (carries the phase and the counts)

A client that raises any of them has ended its session: its secrets are wiped first.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedlearn.errors import FedlearnError

__all__ = [
    "BadAdvertisementError",
    "BadShareSignatureError",
    "CohortTooSmallError",
    "DeadlineError",
    "DuplicateDeviceError",
    "DuplicateKeyError",
    "GraphError",
    "MalformedMessageError",
    "MaskedInputError",
    "ModelHashMismatchError",
    "NotANeighbourError",
    "OfferError",
    "OfferSignatureError",
    "ParamsMismatchError",
    "ParticipationLimitError",
    "PolicyViolationError",
    "ReplayError",
    "RosterError",
    "RosterInconsistentError",
    "RosterTamperedError",
    "RoundAbortedError",
    "SecaggError",
    "SelfNotSurvivorError",
    "ShareDecryptError",
    "ShareError",
    "ShareReconstructionError",
    "StageError",
    "SurvivorError",
    "SurvivorInconsistencyError",
    "SurvivorSubsetError",
    "TooFewNeighboursError",
    "TooFewSignaturesError",
    "TooFewSurvivorsError",
    "UnknownDeviceError",
    "UnsupportedSuiteError",
    "VectorLengthError",
]


class SecaggError(FedlearnError):
    """The root of the tree."""


class MalformedMessageError(SecaggError):
    """Bytes that are no message of the leg that is due: too long, too short, out of order, or with something left."""


class StageError(SecaggError):
    """A message of a leg that is not due: it comes twice, too early, or after the session has ended."""


class OfferError(SecaggError):
    """The offer is not one this client takes."""


class OfferSignatureError(OfferError):
    """The offer is not signed by the server whose key this client was enrolled with."""


class UnsupportedSuiteError(OfferError):
    """The offer names a suite, mode, graph or threshold rule that this version does not have."""


class PolicyViolationError(OfferError):
    """The offer is below a floor of the client's own, or a sum could overflow its lanes."""


class ModelHashMismatchError(OfferError):
    """The model that came is not the one whose hash the offer carries."""


class ReplayError(OfferError):
    """A session that this client has seen before."""


class ParticipationLimitError(OfferError):
    """The client has taken part as often as its owner permits."""


class DeadlineError(OfferError):
    """The offer's deadline has passed by the client's clock, or lies further away than its owner permits."""


class RosterError(SecaggError):
    """Who takes part is not what it must be."""


class UnknownDeviceError(RosterError):
    """A device that is not on the allow-list."""


class BadAdvertisementError(RosterError):
    """An advertisement whose signature does not hold, or one of whose keys is a point of small order."""


class DuplicateDeviceError(RosterError):
    """One device twice in a cohort."""


class DuplicateKeyError(RosterError):
    """One encryption or mask key twice in a cohort."""


class ParamsMismatchError(RosterError):
    """An advertisement for another offer than this one."""


class RosterTamperedError(RosterError):
    """The client's own entry is missing, or is not the one it sent."""


class CohortTooSmallError(RosterError):
    """Fewer clients than the offer and this client's owner agreed to."""


class GraphError(RosterError):
    """The neighbours, their number or the threshold are not those that follow from the roster."""


class ShareError(SecaggError):
    """The shares of a client's secrets cannot be used."""


class NotANeighbourError(ShareError):
    """A share from, or for, a client that is no neighbour."""


class RosterInconsistentError(ShareError):
    """The bitmap of those that shared their secrets contradicts the shares that came with it."""


class BadShareSignatureError(ShareError):
    """The header of a client's shares is not signed by that client."""


class ShareDecryptError(ShareError):
    """A share does not decrypt: it was altered, or is for another pair of clients."""


class TooFewNeighboursError(ShareError):
    """Fewer neighbours than the threshold shared their secrets."""


class MaskedInputError(SecaggError):
    """A masked vector cannot be used."""


class VectorLengthError(MaskedInputError):
    """A vector that has not the length, or the type, that was agreed."""


class SurvivorError(SecaggError):
    """The list of those whose vectors are in the sum is not what it must be."""


class SurvivorSubsetError(SurvivorError):
    """A survivor that was not among those that shared their secrets."""


class SelfNotSurvivorError(SurvivorError):
    """The client sent its vector and is not among the survivors."""


class TooFewSurvivorsError(SurvivorError):
    """Fewer survivors than the offer and this client's owner agreed to."""


class SurvivorInconsistencyError(SurvivorError):
    """Another client was shown another list of survivors."""


class TooFewSignaturesError(SurvivorError):
    """Fewer clients than the threshold confirmed the list of survivors."""


class ShareReconstructionError(SecaggError):
    """A client's secret does not come out of the shares that its neighbours sent.

    Attributes:
        owner: the index of the client whose secret it is.
        reason: what is wrong.
        holder: the index of the client that sent a wrong share, where that is known.
    """

    def __init__(self, owner: int, reason: str, *, holder: int | None = None) -> None:
        self.owner = owner
        self.holder = holder
        self.reason = reason
        super().__init__(f"client {owner}: {reason}")


class RoundAbortedError(SecaggError):
    """Too few clients are left for the sum to be unmasked; nothing was learned, and nothing is kept.

    Attributes:
        phase: the leg in which it was noticed: ``advertise``, ``share``, ``mask``, ``consistent`` or ``unmask``.
        counts: how many clients took part in each leg up to then, and how many were ``needed``.
        reason: what is wrong.
    """

    def __init__(self, phase: str, counts: Mapping[str, int], reason: str) -> None:
        self.phase = phase
        self.counts = dict(counts)
        self.reason = reason
        shown = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        super().__init__(f"aborted in {phase}: {reason} ({shown})")
