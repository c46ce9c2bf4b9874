"""What of the ``[privacy]`` section can be kept, and what is refused because it could not."""

from __future__ import annotations

import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.scenario import apply_overrides, read_scenario

CLIENT = ("privacy.unit=client", "privacy.target-epsilon=8", "federation.clients=100", "federation.cohort=10")
FTRL = (*CLIENT, "privacy.mechanism=dp-ftrl")
DISTRIBUTED = (*CLIENT, "privacy.trust=distributed", "secagg.mode=active")
EXAMPLE = ("privacy.unit=example", "privacy.target-epsilon=8")


def configured(*overrides: str) -> RunConfig:
    return RunConfig.from_mapping(apply_overrides({}, overrides))


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        configured(*overrides)
    return error.value


def test_one_number_is_enough_and_the_rest_follows() -> None:
    client, example, ftrl = configured(*CLIENT), configured(*EXAMPLE), configured(*FTRL)
    assert (client.privacy.trust, example.privacy.trust) == ("central", "local")
    assert (client.federation.sampling, client.privacy.amplification) == ("poisson", "poisson")
    assert (example.federation.sampling, example.privacy.amplification) == ("fixed-size", "none")
    assert (ftrl.federation.sampling, ftrl.privacy.amplification) == ("separated", "none")
    assert ftrl.privacy.min_separation == 10
    assert {each.training.weighting for each in (client, example, ftrl)} == {"uniform"}
    assert configured().training.weighting == "examples"
    assert client.privacy.budget == 8.0
    assert configured(*CLIENT, "privacy.max-epsilon=9").privacy.budget == 9.0
    given = [each for each in CLIENT if "target-epsilon" not in each]
    assert configured(*given, "privacy.noise-multiplier=1", "privacy.max-epsilon=3").privacy.budget == 3.0


@pytest.mark.parametrize("overrides", [(), CLIENT, EXAMPLE, FTRL], ids=["none", "client", "example", "dp-ftrl"])
def test_what_was_derived_reads_back(overrides: tuple[str, ...]) -> None:
    config = configured(*overrides)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert RunConfig.from_json(config.for_clients().to_json()) == config.for_clients()


@pytest.mark.parametrize("unit", ["client", "example"])
def test_privacy_without_a_number_is_refused(unit: str) -> None:
    error = refused(f"privacy.unit={unit}")
    assert error.key == "privacy.target-epsilon"
    assert "privacy.target-epsilon=8" in error.reason


@pytest.mark.parametrize("sampling", ["fixed-size"])
def test_amplification_by_poisson_of_a_cohort_drawn_any_other_way_is_refused(sampling: str) -> None:
    error = refused(*CLIENT, f"federation.sampling={sampling}", "privacy.amplification=poisson")
    assert error.key == "privacy.amplification"
    assert "must not claim it" in error.reason
    assert configured(*CLIENT, f"federation.sampling={sampling}").privacy.amplification == "none"
    assert configured(*CLIENT, "privacy.amplification=none").federation.sampling == "poisson"
    assert refused(*FTRL, "privacy.amplification=poisson").key == "privacy.amplification"


@pytest.mark.parametrize("delta", ["0.01", "0.02", "0.5"])
def test_a_delta_of_one_over_n_or_more_is_refused(delta: str) -> None:
    error = refused(*CLIENT, f"privacy.delta={delta}")
    assert error.key == "privacy.delta"
    assert configured(*CLIENT, "privacy.delta=0.0099").privacy.delta == 0.0099


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((*CLIENT, "privacy.trust=distributed"), "secagg.mode"),
        ((*DISTRIBUTED, "privacy.mechanism=gaussian"), "privacy.mechanism"),
        ((*DISTRIBUTED, "privacy.mechanism=dp-ftrl"), "privacy.mechanism"),
        ((*DISTRIBUTED, "privacy.adaptive-clipping=true"), "privacy.adaptive-clipping"),
        ((*DISTRIBUTED, "privacy.amplification=poisson"), "privacy.amplification"),
        ((*DISTRIBUTED, "federation.sampling=poisson"), "federation.sampling"),
        ((*DISTRIBUTED, "federation.evaluation=both"), "federation.evaluation"),
        ((*EXAMPLE, "privacy.trust=distributed"), "privacy.trust"),
        ((*CLIENT, "privacy.mechanism=skellam"), "privacy.mechanism"),
        ((*CLIENT, "privacy.trust=local"), "privacy.trust"),
        ((*EXAMPLE, "privacy.trust=central"), "privacy.trust"),
        ((*EXAMPLE, "privacy.mechanism=dp-ftrl"), "privacy.mechanism"),
        ((*EXAMPLE, "privacy.adaptive-clipping=true"), "privacy.adaptive-clipping"),
        ((*EXAMPLE, "training.weighting=examples"), "training.weighting"),
        ((*EXAMPLE, "privacy.amplification=poisson"), "privacy.amplification"),
        ((*FTRL, "privacy.adaptive-clipping=true"), "privacy.adaptive-clipping"),
        ((*FTRL, "federation.sampling=poisson"), "federation.sampling"),
        ((*CLIENT, "federation.sampling=separated"), "federation.sampling"),
        (("federation.sampling=separated",), "federation.sampling"),
        ((*FTRL, "privacy.min-separation=11"), "privacy.min-separation"),
        ((*CLIENT, "privacy.min-separation=5"), "privacy.min-separation"),
        ((*CLIENT, "privacy.max-epsilon=3"), "privacy.target-epsilon"),
        ((*CLIENT, "training.weighting=examples"), "training.max-examples"),
        ((*EXAMPLE, "privacy.earlier-ledgers=runs/a"), "privacy.earlier-ledgers"),
        ((*EXAMPLE, "federation.evaluation=both"), "federation.evaluation"),
        (("privacy.unit=client", "privacy.target-epsilon=8", "federation.clients=1"), "federation.clients"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_key(overrides: tuple[str, ...], key: str) -> None:
    assert refused(*overrides).key == key


def test_earlier_ledgers_are_found_from_where_the_scenario_lies(tmp_path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text('[privacy]\nearlier-ledgers = "runs/a, runs/b/ledger.jsonl"\n')
    found = read_scenario(str(scenario)).privacy.earlier_ledgers
    assert found == f"{tmp_path}/runs/a,{tmp_path}/runs/b/ledger.jsonl"
    assert read_scenario(str(scenario)).for_clients().privacy.earlier_ledgers is None
