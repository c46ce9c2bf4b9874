"""Offers that a client takes no part in, each refused with an error of its own, before it has made a key."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attacks import VICTIM, assert_over, not_taken, refused, refused_offer
from cohort import NOW_S, RANDOM, Cohort, encoding, offer, resigned

from fedlearn.secagg.encoding import noised_encoding, plain_encoding
from fedlearn.secagg.errors import (
    DeadlineError,
    ModelHashMismatchError,
    OfferSignatureError,
    ParamsMismatchError,
    ParticipationLimitError,
    PolicyViolationError,
    ReplayError,
    UnknownDeviceError,
    UnsupportedSuiteError,
)
from fedlearn.secagg.keys import SigningKey
from fedlearn.secagg.messages import Advertisement, Offer
from fedlearn.secagg.policy import ClientPolicy

# -- leg 0: the offer ------------------------------------------------------------------------------------------------


def test_an_offer_of_another_server():
    cohort = Cohort(offer())
    other = cohort.offered.signed(SigningKey.generate(RANDOM)).message()
    refused_offer(cohort, other, OfferSignatureError)
    refused_offer(cohort, cohort.offered.message(), OfferSignatureError)


def test_an_offer_that_was_changed_after_it_was_signed():
    cohort = Cohort(offer())
    lower = replace(cohort.server.offer, least_survivors=3).message()
    refused_offer(cohort, lower, OfferSignatureError)


def test_a_session_that_is_replayed():
    cohort = Cohort(offer())
    message = cohort.server.offer.message()
    cohort.begin(VICTIM, message)
    del cohort.sessions[VICTIM]
    refused_offer(cohort, message, ReplayError)
    refused_offer(cohort, resigned(cohort, attempt=2), ReplayError)  # the same session in another offer


def test_a_client_that_has_taken_part_often_enough():
    cohort = Cohort(offer(), policy=ClientPolicy(most_sessions=2))
    for _ in range(2):
        cohort.begin(VICTIM, resigned(cohort, session=RANDOM.token_bytes(32)))
    del cohort.sessions[VICTIM]
    refused_offer(cohort, resigned(cohort, session=RANDOM.token_bytes(32)), ParticipationLimitError)


@pytest.mark.parametrize("ends_in_s", [-1, 0, 86_401, 2**63])
def test_a_deadline_that_has_passed_or_is_too_far_away_by_this_clock(ends_in_s):
    cohort = Cohort(offer())
    refused_offer(cohort, resigned(cohort, deadline_s=int(NOW_S) + ends_in_s), DeadlineError)


@pytest.mark.parametrize("ends_in_s", [1, 86_400])
def test_a_deadline_within_what_is_permitted(ends_in_s):
    cohort = Cohort(offer())
    cohort.begin(VICTIM, resigned(cohort, deadline_s=int(NOW_S) + ends_in_s))


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        (ClientPolicy(), {"suite": 0}),
        (ClientPolicy(), {"suite": 3}),
        (ClientPolicy(suites=(1,)), {"suite": 2}),
        (ClientPolicy(modes=("active",)), {"mode": "semi-honest"}),
    ],
)
def test_a_suite_or_mode_that_is_not_there_or_not_permitted(policy, changes):
    cohort = Cohort(offer(), policy=policy)
    refused_offer(cohort, resigned(cohort, **changes), UnsupportedSuiteError)


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ({}, {"cohort": 2, "least_cohort": 2, "least_survivors": 2}),
        ({}, {"least_cohort": 2}),
        ({}, {"least_survivors": 2}),
        ({"least_cohort": 5}, {"least_cohort": 4}),
        ({"least_survivors": 5}, {"least_survivors": 4}),
        ({}, {"cohort": 2}),
        ({}, {"cohort": 4, "least_cohort": 5}),
        ({"least_honest": 4}, {"least_survivors": 4, "colluding": 0.2}),
        ({}, {"cohort": 7, "least_survivors": 3, "colluding": 0.3, "encoding": encoding(clients=7)}),  # one is honest
        ({"least_colluding": 0.2}, {"colluding": 0.1}),
        ({}, {"colluding": 0.34}),
        ({}, {"colluding": -0.1}),
        ({}, {"dropping": 0.5}),
        ({}, {"dropping": -1e-300}),
        ({}, {"cohort": 6}),  # more than the lanes are made for
        ({"least_noise_multiplier": 0.1}, {}),
    ],
)
def test_an_offer_below_a_floor_of_the_clients_own(policy, changes):
    cohort = Cohort(offer(), policy=ClientPolicy(**policy))
    refused_offer(cohort, resigned(cohort, **changes), PolicyViolationError)


def noised(**changes: object) -> Offer:
    """Return an offer with noise of 1.0 times the sensitivity in the sum of 3 honest survivors."""
    made = noised_encoding(
        size=64, bits=21, bound_l2=1.0, clients=5, noise_multiplier=1.0, honest=3, rotation=bytes(32)
    )
    return offer(encoding=replace(made, **changes))


def test_noise_below_the_clients_floor():
    for multiplier, permitted in ((1.0, True), (1.001, False)):
        cohort = Cohort(noised(), policy=ClientPolicy(least_noise_multiplier=multiplier))
        if permitted:
            cohort.begin(VICTIM, cohort.server.offer.message())
        else:
            refused_offer(cohort, cohort.server.offer.message(), PolicyViolationError)


def test_fewer_survivors_mean_less_noise():
    cohort = Cohort(noised(), policy=ClientPolicy(least_noise_multiplier=1.0))
    refused_offer(cohort, resigned(cohort, least_survivors=3), PolicyViolationError)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 1e9},
        {"clients": 6},
        {"clients": 1 << 20},
        {"bound_l2": 1.01},
        {"bits": 16},
        {"bits": 20},
        {"bits": 0},
        {"most_weight": 1 << 20},
        {"most_weight": 0},
        {"scale": 0.0},
        {"scale": -1.0},
        {"bound_l2": 0.0},
        {"bound_l2": -1.0},
        {"size": 0},
        {"size": 1 << 41},
        {"rotation": bytes(31)},
        {"rotation": bytes(32)},
        {"noise_variance": -1.0},
        {"noise_variance": 1.0},
        {"noise_variance": 1.0, "rotation": bytes(32), "most_weight": 2},
        {"noise_variance": 1.0, "rotation": bytes(32), "counts_clipped": True},
        {"noise_variance": 1e12, "rotation": bytes(32), "counts_clipped": False},
        {"noise_variance": 1e300, "rotation": bytes(32), "counts_clipped": False},
        {"scale": 9.0, "noise_variance": 1e-300, "rotation": bytes(32), "counts_clipped": False},  # none can be drawn
        {"scale": 1e300, "bound_l2": 1e300},
        {"scale": 1e200, "noise_variance": 1.0, "rotation": bytes(32), "counts_clipped": False},
        {"scale": 1e300, "bound_l2": 1e300, "noise_variance": 1.0, "rotation": bytes(32), "counts_clipped": False},
    ],
)
def test_an_encoding_in_which_a_lane_could_overflow_or_that_is_none(changes):
    cohort = Cohort(offer())
    made = replace(plain_encoding(size=8, bits=21, bound_l2=1.0, clients=5), **changes)
    refused_offer(cohort, resigned(cohort, encoding=made), PolicyViolationError)


def test_a_device_that_is_not_on_its_own_list():
    cohort = Cohort(offer())
    cohort.keys[VICTIM] = SigningKey.generate(RANDOM)
    refused_offer(cohort, cohort.server.offer.message(), UnknownDeviceError)


def test_another_model_for_one_client():
    cohort = Cohort(offer())
    message = cohort.until("mask")[VICTIM]
    cohort.sessions[VICTIM].accept_shares(message)
    with pytest.raises(ModelHashMismatchError):
        cohort.sessions[VICTIM].check_model(bytes(32))
    assert_over(cohort.sessions[VICTIM])


def test_another_offer_for_one_client():
    """It names another model, so that the victim would be the only one to train it."""
    cohort = Cohort(offer())
    cohort.server.begin(range(5))
    for client in range(5):
        message = resigned(cohort, model_sha256=bytes(32)) if client == VICTIM else cohort.server.offer.message()
        answer = cohort.begin(client, message)
        if client == VICTIM:
            not_taken(cohort, client, answer, ParamsMismatchError)  # an honest server notices
            cohort.server._advertised[client] = Advertisement.read(answer)  # a lying one goes on
        else:
            cohort.server.receive(client, answer)
    outgoing = cohort.server.advance()
    for client in range(5):
        refused(cohort, "share", outgoing[client], ParamsMismatchError, client)


@pytest.mark.parametrize("floors", [{"least_cohort": 2}, {"least_survivors": 2}, {"least_honest": 0}])
def test_no_owner_can_be_content_with_less_than_hides_anybody(floors):
    with pytest.raises(ValueError, match="at least 3"):
        ClientPolicy(**floors)
