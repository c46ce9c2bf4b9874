"""``fedlearn plan``: what a run will cost, before it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fedlearn.cli.arguments import AsJson, Overrides, Source

if TYPE_CHECKING:
    from fedlearn.algorithms import Algorithm
    from fedlearn.config import RunConfig
    from fedlearn.data.loaders import Distribution, Sizes
    from fedlearn.learning import Examples, FlatModel, Task

__all__ = ["run"]

_TIMED_S = 0.4
_TIMED_EXAMPLES = 1024

_FOLDER = "/dev/shm/fedlearn-keys-xxxxxxxx"  # noqa: S108 - nothing is written there; a name as long as a simulation's


def run(source: Source = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run will cost: traffic, work, minutes, epsilon. No round is run and nothing is written."""
    from fedlearn.scenario import read_scenario

    plan = _plan(read_scenario(source, overrides or ()))
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json(plan)
    else:
        _show(plan)


# -- what is known -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _Setting:
    """Everything of a run that exists before its first round."""

    config: RunConfig
    task: Task
    algorithm: Algorithm
    model: FlatModel
    distribution: Distribution
    sizes: Sizes
    test: Examples | None

    @property
    def rounds_evaluated(self) -> list[int]:
        """The rounds after which the model is measured: every so many, and the last."""
        from fedlearn.federation.validation import is_measured

        return [each for each in range(1, self.config.federation.rounds + 1) if is_measured(self.config, each)]

    @property
    def asks_clients(self) -> bool:
        """Whether clients evaluate."""
        from fedlearn.federation.validation import asks_clients

        return asks_clients(self.config, self.test)

    @property
    def tester(self) -> int:
        """A client that has test examples of its own."""
        return next(client for client, size in zip(self.sizes.clients, self.sizes.test, strict=True) if size)

    @property
    def answered(self) -> float:
        """The expected share of requests that are answered."""
        return self.config.faults.answered


def _setting(config: RunConfig) -> _Setting:
    """Load the task and its data and build its model, as a run would begin."""
    from fedlearn.algorithms import build_algorithm
    from fedlearn.data.loaders import distribute_data
    from fedlearn.federation.validation import central_test
    from fedlearn.learning import build_flat_model
    from fedlearn.sources import SeedTree
    from fedlearn.tasks import load_task

    task, training = load_task(config.task), config.training
    algorithm = build_algorithm(
        training.algorithm, server_learning_rate=training.server_learning_rate, options=training.options
    )
    distribution = distribute_data(task, config)
    return _Setting(
        config=config,
        task=task,
        algorithm=algorithm,
        model=build_flat_model(task, SeedTree.root(config.seed).child("initialise")),
        distribution=distribution,
        sizes=distribution.sizes(),
        test=central_test(task, config),
    )


def _plan(config: RunConfig) -> dict[str, Any]:
    """Return the plan, as machines are told it."""
    from fedlearn.learning import local_steps

    setting = _setting(config)
    sizes = setting.sizes.train
    steps = [local_steps(size, config.training) if size else 0 for size in sizes]
    clock = _timed(setting, sizes, steps)
    federation = config.federation
    return {
        "task": config.task,
        "seed": config.seed,
        "algorithm": config.training.algorithm,
        "parameters": setting.model.spec.size,
        "rounds": federation.rounds,
        "clients": federation.clients,
        "cohort": federation.cohort,
        "client_updates": federation.rounds * federation.cohort,
        **_traffic(setting),
        "examples_per_client": _spread(sizes),
        "local_steps_per_round": _spread(steps),
        **({"sampled_clients": len(sizes)} if len(sizes) < federation.clients else {}),
        **clock,
        "secagg": config.secagg.mode,
        "privacy": _promise(setting),
        "config_sha256": config.sha256(),
    }


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    """Return the smallest, the middle and the largest."""
    return {"min": min(numbers), "median": median(numbers), "max": max(numbers)}


# -- privacy -----------------------------------------------------------------------------------------------------


def _promise(setting: _Setting) -> dict[str, Any]:
    """Return what the run would promise and spend, under each assumption about how its cohorts are drawn."""
    from fedlearn.learning import check_prepare
    from fedlearn.learning.validators import check_private

    privacy = setting.config.privacy
    if privacy.unit == "none":
        return {"unit": "none", "epsilon": "inf"}
    said: dict[str, Any] = {"unit": privacy.unit, "trust": privacy.trust, "budget": privacy.budget}
    check_private(setting.model.module, unit=privacy.unit, mode=privacy.grad_sample_mode)
    if privacy.unit == "example":
        check_prepare(setting.task)
        return {**said, "epsilon": privacy.target_epsilon or "inf"}
    from fedlearn.federation.journal import earlier_releases
    from fedlearn.privacy.plan import plan_privacy

    evaluated = setting.rounds_evaluated if setting.asks_clients else []
    from fedlearn.secagg.terms import Terms

    distributed, size = privacy.trust == "distributed", setting.model.spec.trainable_size
    plan = plan_privacy(
        setting.config,
        evaluated=evaluated,
        earlier=earlier_releases(setting.config),
        summed=Terms.of(setting.config).summed(size) if distributed else None,
    )
    return {
        **said,
        "mechanism": privacy.mechanism,
        "epsilon": plan.epsilon(),
        "epsilon_without_amplification": plan.without_amplification().epsilon(),
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "expected_cohort": setting.config.federation.cohort,
    }


def _promise_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the promise in words."""
    from fedlearn.cli.promise import epsilon_text, promise_rows

    rows = promise_rows(plan["privacy"], plan["rounds"], masked=plan["secagg"] != "ideal")
    budget, epsilon = plan["privacy"].get("budget"), plan["privacy"]["epsilon"]
    if budget is not None and epsilon != "inf" and epsilon > budget:
        rows.insert(1, ("", "above the budget: the run will end before its last round"))
    without = plan["privacy"].get("epsilon_without_amplification")
    if without is not None and without > plan["privacy"]["epsilon"] * 1.001:
        rows.insert(1, ("", f"{epsilon_text(without)} if who is invited were no secret"))
    return rows


# -- bytes -------------------------------------------------------------------------------------------------------


def _traffic(setting: _Setting) -> dict[str, Any]:
    """Return the bytes that the run will count: the sizes of the very records that it will exchange.

    Exact where no fault is asked for and no round is repeated. With faults it is the expected number,
    without the tries that a round may need again.
    """
    federation = setting.config.federation
    answered, cohort, clients = setting.answered, federation.cohort, federation.clients
    if setting.config.secagg.mode != "off":
        return _masked_traffic(setting)
    train_up, evaluate_up = _reply_bytes(setting)
    evaluated = setting.rounds_evaluated if setting.asks_clients else []
    asked_down = _request_bytes(setting, range(1, federation.rounds + 1)) + _request_bytes(setting, evaluated)
    down = cohort * asked_down
    up = answered * cohort * (federation.rounds * train_up + len(evaluated) * evaluate_up)
    last = federation.rounds
    return {
        "upload_bytes_per_client_and_round": train_up + (evaluate_up if evaluated else 0),
        "download_bytes_per_client_and_round": _request_bytes(setting, [last]) * (2 if evaluated else 1),
        "upload_bytes_per_client": int(up) // clients,
        "download_bytes_per_client": down // clients,
        "server_received_bytes": int(up),
        "server_sent_bytes": down,
        "evaluation": _who_evaluates(setting),
    }


def _masked_traffic(setting: _Setting) -> dict[str, Any]:
    """Return the same where the server sees a sum alone: every leg of every round, and no evaluation by clients."""
    federation = setting.config.federation
    cohort, clients, rounds = federation.cohort, federation.clients, range(1, federation.rounds + 1)
    down = sum(each_down for number in rounds for each_down, _ in _leg_bytes(setting, number))
    up = sum(each_up for number in rounds for _, each_up in _leg_bytes(setting, number))
    last = _leg_bytes(setting, federation.rounds)
    received = int(setting.answered * cohort * up)
    return {
        "upload_bytes_per_client_and_round": sum(each for _, each in last),
        "download_bytes_per_client_and_round": sum(each for each, _ in last),
        "upload_bytes_per_client": received // clients,
        "download_bytes_per_client": cohort * down // clients,
        "server_received_bytes": received,
        "server_sent_bytes": cohort * down,
        "evaluation": _who_evaluates(setting),
    }


def _leg_bytes(setting: _Setting, number: int) -> list[tuple[int, int]]:
    """Return what one client is sent, and answers, in each leg of a round."""
    import numpy as np

    from fedlearn.federation.messages import LegRequest, RoundPlan
    from fedlearn.flower.records import leg_records, leg_reply_records, size_bytes, vector_record
    from fedlearn.secagg.cost import LegBytes, leg_bytes
    from fedlearn.secagg.terms import Terms

    config, spec = setting.config, setting.model.spec
    terms = Terms.of(config)
    hides = config.privacy.unit == "client"
    encoding = terms.encoding(spec.trainable_size if hides else spec.size, noise_multiplier=1.0 if hides else None)
    offer = terms.offer(encoding)
    ideal = [LegBytes(leg="ideal", down=len(offer.message()), up=encoding.upload_bytes)]
    plan = RoundPlan(
        config=config,
        round_number=number,
        attempt=1,
        proximal_mu=setting.algorithm.proximal_mu,
        spec_sha256=spec.sha256,
        bound_l2=terms.bound_l2,
        run=32 * "0",
        identities=_FOLDER if config.secagg.masks else "",
        watched=0 if config.secagg.masks else -1,
    )
    vector, found = vector_record("vector", np.zeros(spec.size, dtype=spec.dtype)), []
    for leg in leg_bytes(offer) if config.secagg.masks else ideal:
        request = LegRequest(leg=leg.leg, client=0, plan=plan, body=bytes(leg.down))
        model = vector if leg.leg in ("mask", "ideal") else None
        found.append((size_bytes(leg_records(request, model)), size_bytes(leg_reply_records(bytes(leg.up)))))
    return found


def _who_evaluates(setting: _Setting) -> str:
    """Return who measures the model: ``server``, ``clients``, ``both`` or ``nobody``."""
    if not setting.asks_clients:
        return "server" if setting.test is not None else "nobody"
    if not setting.sizes.test:
        return "server" if setting.test is not None else "nobody"
    return "both" if setting.test is not None else "clients"


def _request_bytes(setting: _Setting, rounds: Sequence[int]) -> int:
    """Return the bytes that one client is sent in these rounds: the model, and the plan of each round."""
    import numpy as np

    from fedlearn.federation.messages import RoundPlan
    from fedlearn.flower.records import request_records, size_bytes, vector_record

    spec = setting.model.spec
    vector = vector_record("vector", np.zeros(spec.size, dtype=spec.dtype))
    total, of_length = 0, dict[int, int]()  # two plans differ in size only by the digits of their round
    for number in rounds:
        length = len(str(number))
        if length not in of_length:
            plan = RoundPlan(
                config=setting.config,
                round_number=number,
                attempt=1,
                proximal_mu=setting.algorithm.proximal_mu,
                spec_sha256=spec.sha256,
                bound_l2=setting.config.privacy.bound_l2 if setting.config.privacy.unit == "client" else None,
                run=32 * "0",
            )
            of_length[length] = size_bytes(request_records(vector, plan))
        total += of_length[length]
    return total


def _reply_bytes(setting: _Setting) -> tuple[int, int]:
    """Return the bytes of one client's answers to ``train`` and to ``evaluate`` (0: no client could)."""
    import numpy as np

    from fedlearn.federation.messages import reply_numbers
    from fedlearn.flower.records import evaluate_reply_records, size_bytes, train_reply_records

    spec = setting.model.spec
    numbers = dict.fromkeys(reply_numbers(setting.config), 0)
    train = size_bytes(train_reply_records(np.zeros(spec.size, dtype=spec.dtype), numbers))
    if not setting.asks_clients or not setting.sizes.test:
        return train, 0
    own = setting.task.prepare(setting.distribution.client(setting.tester)).test
    names = _evaluated(setting, own)[1] if own is not None and len(own) else {}
    if setting.config.privacy.unit != "none":
        return train, size_bytes(evaluate_reply_records(dict.fromkeys(setting.task.metric_names, 0.0)))
    return train, size_bytes(evaluate_reply_records({"num-examples": 1, **dict.fromkeys(names, 0.0)})) if names else 0


# -- time --------------------------------------------------------------------------------------------------------


def _timed(setting: _Setting, sizes: Sequence[int], steps: Sequence[int]) -> dict[str, Any]:
    """Estimate the run's minutes from less than about a second of one client's training on this machine."""
    config = setting.config
    federation = config.federation
    index = sizes.index(median_low(sizes))
    client = setting.sizes.clients[index]
    client_s = _step_s(setting, client, steps[index]) * sum(steps) / len(steps)
    processes = min(max(config.simulation.workers, 1), os.cpu_count() or 1)
    train_s = federation.rounds * federation.cohort * setting.answered * client_s / processes
    step_ms = 1000 * client_s * len(steps) / max(sum(steps), 1)
    of_sample = f" of a sample of {len(sizes)}" if len(sizes) < federation.clients else ""
    minutes = (train_s + len(setting.rounds_evaluated) * _evaluation_s(setting)) / 60
    return {
        "estimated_minutes": round(minutes, 4),
        "estimate": (
            f"client {client} ({sizes[index]} examples, the median{of_sample}) was trained for a moment on this "
            f"machine; its time a step, {step_ms:.3g} ms, times the mean number of steps, "
            f"{federation.cohort} clients, {federation.rounds} rounds"
            + (f", over {processes} processes" if processes > 1 else "")
            + "; loading and messages come on top"
            + (", and the keys, shares and masks of every client" if config.secagg.masks else "")
        ),
    }


def _step_s(setting: _Setting, client: int, steps: int) -> float:
    """Return the seconds of one descent step of ``client``, from as many of its ``steps`` as a moment allows."""
    from fedlearn.learning import train
    from fedlearn.sources import SeedTree

    examples = setting.task.prepare(setting.distribution.client(client)).train
    received = setting.model.vector()
    done, elapsed_s = 0, 0.0
    wanted = 1
    for attempt in range(8):  # the first is to warm up; each is longer than the one before
        training = replace(setting.config.training, local_epochs=None, local_steps=wanted)
        started_s = perf_counter()
        train(
            setting.model,
            setting.task,
            received,
            examples,
            training,
            proximal_mu=setting.algorithm.proximal_mu,
            seeds=SeedTree.root(setting.config.seed).child("plan"),
        )
        done, elapsed_s = wanted, perf_counter() - started_s
        if elapsed_s > _TIMED_S / 2 or (attempt and wanted == steps):
            break
        wanted = min(steps, max(4 * wanted, int(wanted * _TIMED_S / max(elapsed_s, 1e-6) / 2)))
    return elapsed_s / done


def _evaluation_s(setting: _Setting) -> float:
    """Return the seconds of measuring the model once, wherever it is measured."""
    tests, seconds = setting.sizes.test, 0.0
    if setting.test is not None:
        seconds += _evaluated(setting, setting.test)[0] * len(setting.test)
    if setting.asks_clients and tests:
        own = setting.task.prepare(setting.distribution.client(setting.tester)).test
        mean = sum(tests) / len(tests)
        if own is not None and len(own):
            seconds += _evaluated(setting, own)[0] * mean * setting.config.federation.cohort
    return seconds


def _evaluated(setting: _Setting, examples: Examples) -> tuple[float, Mapping[str, float]]:
    """Return the seconds an example that measuring takes, and what was measured."""
    import numpy as np

    from fedlearn.learning import evaluate
    from fedlearn.sources import SeedTree

    few = examples.take(np.arange(min(len(examples), _TIMED_EXAMPLES)))
    seeds = SeedTree.root(setting.config.seed).child("plan")
    started_s = perf_counter()
    sums = evaluate(setting.model, setting.task, setting.model.vector(), few, seeds=seeds).sums
    return (perf_counter() - started_s) / len(few), sums


# -- the table ---------------------------------------------------------------------------------------------------


def _show(plan: Mapping[str, Any]) -> None:
    """Write the plan as a table."""
    from fedlearn.cli.rendering import bytes_text, console, duration_text, facts

    def spread(name: str) -> str:
        values = plan[name]
        return f"{values['median']:,g} (from {values['min']:,} to {values['max']:,})"

    per_round = f"{plan['cohort']:,} of {plan['clients']:,} clients a round"
    everyone = plan["cohort"] == plan["clients"]
    up, down = (plan[f"{way}_bytes_per_client_and_round"] for way in ("upload", "download"))
    rows = [
        ("estimated time", f"about {duration_text(60 * plan['estimated_minutes'])}"),
        ("model", f"{plan['parameters']:,} parameters, {plan['algorithm']}"),
        ("rounds", f"{plan['rounds']:,}"),
        ("cohort", f"all {plan['clients']:,} clients" if everyone else per_round),
        ("client updates", f"{plan['client_updates']:,}"),
        ("upload per client", f"{bytes_text(up)} a round, {bytes_text(plan['upload_bytes_per_client'])} in all"),
        ("download per client", f"{bytes_text(down)} a round, {bytes_text(plan['download_bytes_per_client'])} in all"),
        (
            "server",
            f"receives {bytes_text(plan['server_received_bytes'])}, sends {bytes_text(plan['server_sent_bytes'])}",
        ),
        ("examples", f"a client: {spread('examples_per_client')}{_of_sample(plan)}"),
        ("local steps", f"a client and round: {spread('local_steps_per_round')}"),
        ("measured by", _MEASURED_BY[plan["evaluation"]]),
        *_promise_rows(plan),
    ]
    stdout = console()
    stdout.print()
    stdout.print(facts(rows, title=f"Plan: {plan['task']}, seed {plan['seed']}", headline=1))
    stdout.print(f"\nThe time is an estimate: {plan['estimate']}.", style="dim")


def _of_sample(plan: Mapping[str, Any]) -> str:
    """Say how many clients were looked at, where that is not all of them."""
    return f", of {plan['sampled_clients']} clients looked at" if "sampled_clients" in plan else ""


_MEASURED_BY = {
    "server": "the server, on the central test set",
    "clients": "the clients, on their own test examples",
    "both": "the server and the clients",
    "nobody": "nobody: there is nothing to test on, or federation.evaluation = off",
}
