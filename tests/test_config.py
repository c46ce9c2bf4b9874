"""The configuration: what is accepted, what is refused and in which words, and that nothing is lost."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlearn.config
import fedlearn.config_reading
from fedlearn.config import (
    DataConfig,
    FaultsConfig,
    FederationConfig,
    PrivacyConfig,
    RunConfig,
    SecaggConfig,
    SimulationConfig,
    TrainingConfig,
)
from fedlearn.errors import ConfigError, MissingError
from fedlearn.scenario import apply_overrides, load_config, read_scenario

# Word for word the contract of architecture.md, "One configuration, one command line".
ARCHITECTURE_EXAMPLE = """\
task = "digits"                 # a built-in name, package.module:Class, or path/to/my_task.py[:Class]
seed = 0

[federation]
clients = 20
cohort = 20                     # expected clients a round
rounds = 20
min-respondents = 10
round-timeout-s = 600

[data]
partition = "dirichlet"         # iid | dirichlet | shards | natural | quantity
alpha = 0.5
# path = "…"                    # for tasks that read files

[training]
algorithm = "fedavg"            # fedavg | fedprox | fedavgm | fedadam | fedyogi | fedadagrad | …
local-epochs = 2                # or local-steps
batch-size = 16                 # 0: the whole local data set
learning-rate = 0.1
server-learning-rate = 1.0
weighting = "examples"          # uniform | examples (capped by max-examples)

[privacy]
unit = "none"                   # none | example | client
trust = "central"               # local | central | distributed
target-epsilon = 8.0            # noise-multiplier is derived, or set instead
delta = "auto"
bound-l2 = 1.0
adaptive-clipping = false
mechanism = "gaussian"          # gaussian | dp-ftrl | skellam

[secagg]
mode = "off"                    # off | ideal | semi-honest | active
bits = 21

[simulation]
workers = 0
engine = "local"                # local | flower

[faults]
drop = 0.0
"""


def overridden(text: str, overrides: Sequence[str]) -> RunConfig:
    """Return the config of a TOML document after overrides."""
    if not overrides:
        return RunConfig.from_toml(text)
    return RunConfig.from_mapping(apply_overrides(tomllib.loads(text), overrides))


def refused(*overrides: str, text: str = "") -> ConfigError:
    """Return the error that a scenario with these overrides is refused with."""
    with pytest.raises(ConfigError) as caught:
        overridden(text, overrides)
    return caught.value


# Accepted


def test_architecture_example() -> None:
    config = RunConfig.from_toml(ARCHITECTURE_EXAMPLE)
    expected = RunConfig(training=TrainingConfig(server_learning_rate=1.0), privacy=PrivacyConfig(target_epsilon=8.0))
    assert config == expected
    assert config.federation.round_timeout_s == 600.0
    assert isinstance(config.federation.round_timeout_s, float)


def test_nothing_at_all_is_the_default() -> None:
    assert RunConfig.from_toml("") == RunConfig.from_mapping({}) == RunConfig()


def test_derived_values() -> None:
    assert FederationConfig() == FederationConfig(clients=20, cohort=20, min_respondents=10)
    assert FederationConfig(clients=9, cohort=5).min_respondents == 3
    assert FederationConfig(clients=1).min_respondents == 1
    assert TrainingConfig().local_epochs == 2
    assert TrainingConfig(local_steps=5).local_epochs is None
    assert RunConfig(federation=FederationConfig(clients=4)).federation.cohort == 4


def test_options_are_snake_case_inside_and_read_only() -> None:
    config = RunConfig.from_toml("[training.options]\nproximal-mu = 0.1\nnesterov = true\nsteps = 3\nkind = 'a'")
    options = config.training.options
    assert dict(options) == {"proximal_mu": 0.1, "nesterov": True, "steps": 3, "kind": "a"}
    with pytest.raises(TypeError):
        options["proximal_mu"] = 1.0  # type: ignore[index]
    assert config.to_mapping()["training"]["options"]["proximal-mu"] == 0.1


def test_options_do_not_follow_their_source() -> None:
    source: dict[str, Any] = {"proximal_mu": 0.1}
    training = TrainingConfig(options=source)
    source["proximal_mu"] = 9.0
    assert training.options == {"proximal_mu": 0.1}


def test_frozen_hashable_picklable_copyable() -> None:
    config = RunConfig(training=TrainingConfig(options={"proximal_mu": 0.1}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config  # noqa: S301
    assert len({config, copy.deepcopy(config)}) == 1
    assert dataclasses.asdict(config)["training"]["options"] == {"proximal_mu": 0.1}
    with pytest.raises(TypeError):
        RunConfig("digits")  # type: ignore[misc]


# Round trips


def floats(above: float, below: float | None = None) -> st.SearchStrategy[float]:
    return st.floats(above, below, exclude_min=True, exclude_max=below is not None, allow_infinity=False)


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)
counts = st.integers(1, 2**63 - 1)
option_values = st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | floats(-1e300) | words
option_names = st.from_regex(r"[a-z][a-z0-9]{0,3}(_[a-z0-9]{1,3}){0,2}", fullmatch=True)


@st.composite
def federations(draw: st.DrawFn) -> FederationConfig:
    clients = draw(counts)
    cohort = draw(st.none() | st.integers(1, clients))
    return FederationConfig(
        clients=clients,
        cohort=cohort,
        min_respondents=draw(st.none() | st.integers(1, cohort or clients)),
        rounds=draw(counts),
        round_timeout_s=draw(floats(0)),
        evaluation=draw(st.sampled_from(["auto", "central", "federated", "both", "off"])),
    )


@st.composite
def trainings(draw: st.DrawFn) -> TrainingConfig:
    length: dict[str, Any] = draw(
        st.just({}) | counts.map(lambda n: {"local_epochs": n}) | counts.map(lambda n: {"local_steps": n})
    )
    return TrainingConfig(
        **length,
        algorithm=draw(words),
        batch_size=draw(st.integers(0, 99)),
        learning_rate=draw(floats(0)),
        server_learning_rate=draw(st.none() | floats(0)),
        momentum=draw(st.just(-0.0) | st.floats(0, 1, exclude_max=True)),
        options=draw(st.dictionaries(option_names, option_values, max_size=3)),
    )


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    return RunConfig(
        task=draw(words),
        seed=draw(st.integers(0, 2**63 - 1)),
        federation=draw(federations()),
        data=DataConfig(
            partition=draw(st.sampled_from(["iid", "dirichlet", "shards", "natural", "quantity"])),
            path=draw(st.none() | words),
        ),
        training=draw(trainings()),
        privacy=PrivacyConfig(target_epsilon=draw(st.none() | floats(0)), delta=draw(st.just("auto") | floats(0, 1))),
        secagg=SecaggConfig(bits=draw(st.sampled_from([16, 21, 32]))),
        simulation=SimulationConfig(workers=draw(st.integers(0, 64))),
        faults=FaultsConfig(drop=draw(st.floats(0, 1, exclude_max=True))),
    )


@settings(max_examples=15, deadline=None)
@given(configs())
def test_round_trip_through_toml_and_json(config: RunConfig) -> None:
    for again in (
        RunConfig.from_toml(config.to_toml()),
        RunConfig.from_mapping(json.loads(config.to_json())),
        RunConfig.from_mapping(config.to_mapping()),
    ):
        assert again == config
        assert again.to_json() == config.to_json()
        assert again.sha256() == config.sha256()
        assert hash(again) == hash(config)


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3))
def test_any_value_anywhere_is_taken_or_refused_as_a_config_error(value: Any) -> None:
    for section in (None, *RunConfig().to_mapping()):
        table = RunConfig().to_mapping() if section is None else RunConfig().to_mapping()[section]
        for name in table if isinstance(table, dict) else ():
            mapping = {name: value} if section is None else {section: {name: value}}
            try:
                config = RunConfig.from_mapping(mapping)
            except ConfigError as error:
                assert error.key.startswith(name if section is None else f"{section}.{name}")
            else:
                assert RunConfig.from_toml(config.to_toml()) == config


def test_canonical_json() -> None:
    text = RunConfig(data=DataConfig(path="é")).to_json()
    assert text.isascii()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert '"local-epochs":2' in text
    assert "null" not in text
    assert "options" not in text


def test_sha256_ignores_what_changes_only_the_speed() -> None:
    base = RunConfig()
    assert base.sha256() == RunConfig(simulation=SimulationConfig(workers=2)).sha256()
    assert base.sha256() == RunConfig.from_toml("[federation]\ncohort = 20\n[faults]\ndrop = -0.0").sha256()
    assert base.sha256() != RunConfig(seed=1).sha256()
    assert base.sha256() != RunConfig(faults=FaultsConfig(drop=0.1)).sha256()
    assert len(base.sha256()) == 64


# Overrides


def test_overrides_are_toml_or_bare_strings() -> None:
    config = overridden(
        "seed = 1",
        [
            "seed=2",
            "seed = 3",
            "federation.clients=4",
            "federation.evaluation=off",
            "data.partition=iid",
            "data.path=./a=b, c.csv",
            "training.learning-rate=0.01",
            "training.options.proximal-mu=0.1",
            'training.algorithm="fedprox"',
        ],
    )
    assert config.seed == 3
    assert config.federation.cohort == 4  # derived only once everything is merged
    assert config.federation.evaluation == "off"
    assert config.data == DataConfig(partition="iid", path="./a=b, c.csv")
    expected = TrainingConfig(
        algorithm="fedprox", learning_rate=0.01, weighting="examples", options={"proximal_mu": 0.1}
    )
    assert config.training == expected


def test_overrides_are_checked_after_merging() -> None:
    text = "[federation]\nclients = 4\ncohort = 8"
    assert refused(text=text).key == "federation.cohort"
    assert overridden(text, ["federation.clients=8"]).federation.cohort == 8


def test_overrides_leave_their_argument_alone() -> None:
    mapping = {"federation": {"clients": 4}}
    assert apply_overrides(mapping, ["federation.clients=5"]) == {"federation": {"clients": 5}}
    assert mapping == {"federation": {"clients": 4}}


def test_override_cannot_smuggle_in_a_second_key() -> None:
    assert apply_overrides({}, ["task=1\ny = 2"]) == {"task": "1\ny = 2"}


@pytest.mark.parametrize(
    ("override", "key", "reason"),
    [
        ("federation.clients", "federation.clients", 'there is no "="'),
        ("=3", "=3", "part of the key is empty"),
        ("federation.=3", "federation.=3", "part of the key is empty"),
        ("seed.deep=1", "seed", "expected a table, got an integer, so seed.deep cannot be set"),
        ("seed=", "seed", "expected an integer, got a string"),
        ("task=", "task", "must not be empty"),
    ],
)
def test_bad_override(override: str, key: str, reason: str) -> None:
    error = refused(override, text="seed = 0")
    assert error.key == key
    assert reason in error.reason


# Refused: keys


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("federation.client=3", "federation.client", "clients"),
        ("federation.round_timeout_s=3", "federation.round_timeout_s", "round-timeout-s"),
        ("training.Learning_Rate=3", "training.Learning_Rate", "learning-rate"),
        ("federaton.clients=3", "federaton", "federation"),
        ("federation.learning-rate=3", "federation.learning-rate", "training.learning-rate"),
        ("training.partition=iid", "training.partition", "data.partition"),
        ("clients=3", "clients", "federation.clients"),
        ("delta=0.1", "delta", "privacy.delta"),
        ("federation.seed=3", "federation.seed", "seed"),
        ("federation.xyzzy=3", "federation.xyzzy", None),
    ],
)
def test_unknown_key(override: str, key: str, suggestion: str | None) -> None:
    error = refused(override)
    assert (error.key, error.reason, error.suggestion) == (key, "unknown key", suggestion)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("proximal_mu", "proximal-mu"), ("Proximal-Mu", "proximal-mu"), ("-x", None)]
)
def test_option_names_are_kebab_case_in_toml(name: str, suggestion: str | None) -> None:
    error = refused(f"training.options.{name}=1")
    assert (error.key, error.suggestion) == (f"training.options.{name}", suggestion)
    assert "joined by hyphens" in error.reason


def test_option_names_are_snake_case_in_python() -> None:
    with pytest.raises(ConfigError, match="joined by underscores") as caught:
        TrainingConfig(options={"proximal-mu": 1})
    assert caught.value.suggestion == "proximal_mu"


# Refused: types


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed=true", "expected an integer, got a boolean"),
        ("seed=1.0", "expected an integer, got a decimal number"),
        ("seed=x", "expected an integer, got a string"),
        ("federation.cohort=[1]", "expected an integer, got an array"),
        ("federation.rounds={a=1}", "expected an integer, got a table"),
        ("federation.round-timeout-s=true", "expected a number, got a boolean"),
        ("training.learning-rate=fast", "expected a number, got a string"),
        ("task=3", "expected a string, got an integer"),
        ("data.path=1979-05-27", "expected a string, got a date or time"),
        ("data.partition=3", "expected a string, got an integer"),
        ("privacy.adaptive-clipping=1", "expected a boolean, got an integer"),
        ("privacy.delta=true", 'expected a number or "auto", got a boolean'),
        ("secagg.bits=wide", "expected an integer, got a string"),
        ("training.options=3", "expected a table, got an integer"),
        ("training.options.a=[1]", "expected a boolean, a number or a string, got an array"),
        ("federation=3", "expected a section, [federation], got an integer"),
    ],
)
def test_wrong_type(override: str, reason: str) -> None:
    error = refused(override)
    assert (error.key, error.reason) == (override.partition("=")[0], reason)


def test_wrong_types_from_python() -> None:
    with pytest.raises(ConfigError, match=r"^federation\.clients: expected an integer, got a string$"):
        FederationConfig(clients="4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^data: expected a DataConfig, got a table$"):
        RunConfig(data={})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^seed: expected an integer, got nothing$"):
        RunConfig(seed=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^scenario: expected a table, got an array$"):
        RunConfig.from_mapping([])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^data\.path: expected a value, got nothing$"):
        RunConfig.from_mapping({"data": {"path": None}})


# Refused: values


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed=-1", "must be at least 0, got -1"),
        ("seed=9223372036854775808", "must fit in a signed 64-bit integer"),
        ("federation.clients=0", "must be at least 1, got 0"),
        ("federation.cohort=0", "must be at least 1, got 0"),
        ("federation.cohort=21", "must be at most clients (20), got 21"),
        ("federation.rounds=0", "must be at least 1, got 0"),
        ("federation.min-respondents=0", "must be at least 1, got 0"),
        ("federation.min-respondents=21", "must be at most the cohort (20), got 21"),
        ("federation.round-timeout-s=0", "must be above 0, got 0"),
        ("federation.round-timeout-s=inf", "must be finite, got inf"),
        ("federation.round-tries=0", "must be at least 1, got 0"),
        ("federation.evaluate-every=0", "must be at least 1, got 0"),
        ("data.alpha=nan", "must be finite, got nan"),
        ("data.labels-per-client=0", "must be at least 1, got 0"),
        ("data.path= ", "must not be empty"),
        ("training.algorithm=", "must not be empty"),
        ("training.local-epochs=0", "must be at least 1, got 0"),
        ("training.batch-size=-1", "must be at least 0, got -1"),
        ("training.learning-rate=-0.1", "must be above 0, got -0.1"),
        ("training.server-learning-rate=0.0", "must be above 0, got 0"),
        ("training.momentum=1", "must be below 1, got 1"),
        ("training.momentum=-0.5", "must be at least 0, got -0.5"),
        ("training.max-examples=0", "must be at least 1, got 0"),
        ("training.options.mu=-inf", "must be finite, got -inf"),
        ("privacy.target-epsilon=0", "must be above 0, got 0"),
        ("privacy.noise-multiplier=0", "must be above 0, got 0"),
        ("privacy.delta=1", "must be below 1, got 1"),
        ("privacy.delta=0", "must be above 0, got 0"),
        ("privacy.bound-l2=0", "must be at least 1e-20, got 0"),
        ("simulation.workers=-1", "must be at least 0, got -1"),
        ("faults.drop=1.0", "must be below 1, got 1"),
        ('task="a\\u0007b"', "holds a control character or bytes that are not Unicode text"),
    ],
)
def test_impossible_value(override: str, reason: str) -> None:
    error = refused(override)
    assert (error.key, error.reason) == (override.partition("=")[0], reason)


@pytest.mark.parametrize(
    ("override", "valid", "suggestion"),
    [
        ("data.partition=dirichlett", ["iid", "dirichlet", "shards", "natural", "quantity"], "dirichlet"),
        ("data.partition=IID", ["iid"], "iid"),
        ("federation.evaluation=federatd", ["auto", "central", "federated", "both", "off"], "federated"),
        ("training.weighting=zzz", ["uniform", "examples"], None),
        ("privacy.unit=clients", ["none", "example", "client"], "client"),
        ("privacy.trust=centre", ["local", "central", "distributed"], "central"),
        ("privacy.mechanism=dp_ftrl", ["gaussian", "dp-ftrl", "skellam"], "dp-ftrl"),
        ("secagg.mode=semi_honest", ["off", "ideal", "semi-honest", "active"], "semi-honest"),
        ("simulation.engine=flowers", ["local", "flower"], "flower"),
    ],
)
def test_bad_choice(override: str, valid: list[str], suggestion: str | None) -> None:
    error = refused(override)
    key, _, got = override.partition("=")
    assert error.key == key
    assert error.reason.startswith("must be one of ")
    assert error.reason.endswith(f', got "{got}"')
    assert all(f'"{each}"' in error.reason for each in valid)
    assert error.suggestion == suggestion


def test_bits_and_delta() -> None:
    assert refused("secagg.bits=20").reason == "must be one of 16, 21, 32, got 20"
    error = refused("privacy.delta=Auto")
    assert (error.reason, error.suggestion) == ('expected a number or "auto", got "Auto"', "auto")
    assert overridden("", ["privacy.delta=1e-5"]).privacy.delta == 1e-5


def test_alternatives_exclude_each_other() -> None:
    error = refused(text="[training]\nlocal-epochs = 3\nlocal-steps = 5")
    reason = "only one of local-steps and local-epochs may be set; local-epochs is 3"
    assert (error.key, error.reason) == ("training.local-steps", reason)
    both = "[privacy]\ntarget-epsilon = 8.0\nnoise-multiplier = 1.0"
    assert refused(text=both).key == "privacy.noise-multiplier"
    switched = dataclasses.replace(TrainingConfig(), local_epochs=None, local_steps=5)
    assert switched == TrainingConfig(local_steps=5)


# Refused: what this version cannot do


@pytest.mark.parametrize("mode", ["ideal", "semi-honest", "active"])
@pytest.mark.parametrize(
    ("override", "key"),
    [
        (("federation.clients=2",), "federation.cohort"),
        (("federation.cohort=2",), "federation.cohort"),
        (("federation.evaluation=federated",), "federation.evaluation"),
        (("training.weighting=examples",), "training.max-examples"),
        (("federation.sampling=poisson",), "federation.sampling"),
        (("privacy.unit=client", "privacy.target-epsilon=8"), "privacy.trust"),
        (("secagg.colluding=0.4",), "secagg.colluding"),
        (("secagg.dropping=0.5",), "secagg.dropping"),
    ],
)
def test_what_does_not_go_with_a_server_that_sees_the_sum_alone_is_refused(
    mode: str, override: tuple[str, ...], key: str
) -> None:
    assert refused(f"secagg.mode={mode}", *override).key == key


def test_weights_are_masked_only_where_their_cap_is_chosen() -> None:
    masked = RunConfig.from_toml('[secagg]\nmode = "active"')
    assert masked.training.weighting == "uniform"
    chosen = RunConfig.from_toml('[secagg]\nmode = "active"\n[training]\nmax-examples = 100')
    assert chosen.training.weighting == "examples"


def test_a_leg_that_is_never_sent_cannot_be_the_one_clients_are_lost_at() -> None:
    assert refused("faults.leg=mask").key == "faults.leg"


def test_flowers_engine_breaks_nothing_on_purpose() -> None:
    error = refused("simulation.engine=flower", "faults.drop=0.1")
    assert error.key == "faults.drop"
    assert 'simulation.engine = "local"' in error.reason


def test_flowers_engine_trains_one_by_one() -> None:
    assert refused("simulation.engine=flower", "simulation.trainer=vmap").key == "simulation.trainer"
    assert RunConfig.from_toml('[simulation]\nengine = "flower"\ntrainer = "sequential"').simulation.engine == "flower"


# Files


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text("\ufeff" + ARCHITECTURE_EXAMPLE, encoding="utf-8")
    assert load_config(path) == RunConfig.from_toml(ARCHITECTURE_EXAMPLE)
    assert read_scenario(str(path), ["seed=7"]).seed == 7


def test_load_config_without_a_readable_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(MissingError) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 3


def test_load_config_that_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text("seed = 0\nrounds = = 3\n")
    with pytest.raises(ConfigError, match=r"is not valid TOML: .*line 2, column 10") as caught:
        load_config(path)
    assert caught.value.key == str(path)
    path.write_bytes(b"task = '\xff'")
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize("text", ["seed = 1\nseed = 2", "seed = " + "9" * 5000, "x = " + "[" * 100_000])
def test_hostile_toml_is_a_config_error(text: str) -> None:
    error = refused(text=text)
    assert error.key == "scenario"
    assert "is not valid TOML" in error.reason
    assert error.exit_code == 2


# The module


def test_public_names_are_sorted() -> None:
    for module in (fedlearn.config, fedlearn.config_reading):
        assert list(module.__all__) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_importing_it_is_cheap() -> None:
    heavy = {"torch", "flwr", "numpy", "scipy", "tomli_w"}
    code = f"import sys, fedlearn.config; print(sorted({heavy!r} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Scenarios


def test_paths_of_a_scenario_are_relative_to_it_and_those_of_an_override_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = tmp_path / "question" / "scenario.toml"
    scenario.parent.mkdir()
    scenario.write_text('task = "my_task.py:Mine"\n[data]\npath = "../data"\n[training]\nalgorithm = "algo.py"\n')
    monkeypatch.chdir(tmp_path)
    config = read_scenario(str(scenario))
    assert config.task == f"{scenario.parent}/my_task.py:Mine"
    assert config.data.path == str(tmp_path / "data")
    assert config.training.algorithm == f"{scenario.parent}/algo.py"
    assert read_scenario(str(scenario), ["data.path=here"]).data.path == str(tmp_path / "here")
    assert read_scenario("other.py").task == str(tmp_path / "other.py")
    assert read_scenario("package.module:Class").task == "package.module:Class"
    assert read_scenario(None) == RunConfig()


def test_the_local_length_set_last_takes_the_others_place() -> None:
    assert overridden("[training]\nlocal-epochs = 2", ["training.local-steps=5"]).training.local_epochs is None
    assert overridden("[training]\nlocal-steps = 2", ["training.local-epochs=5"]).training.local_steps is None
