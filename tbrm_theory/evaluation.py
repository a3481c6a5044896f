"""Every exact quantity of an instance as one JSON object: what ``tbrm evaluate --json`` prints (design.md).

Tables are nested ``[layer][state][action]`` in the file's own shape. Everything is in reward units, ``v_star`` and ``q_star`` too
(``beta`` times the values that ``solve`` returns), except that ``kl_to_reference`` is in nats, losses are squares of residuals in
units of ``beta``, and coefficients of coverage are pure numbers. An infinite quantity is the string ``"inf"`` or ``"-inf"``; what is
not defined is null; NaN never occurs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.bounds import corollary4, theorem2
from tbrm_theory.coverage import c_inf, kappa, lemma1, second_moment
from tbrm_theory.dynamic_programming import (
    Solution,
    kl_to_reference,
    objective,
    regret,
    soft_policy,
    solve,
)
from tbrm_theory.instance import Instance
from tbrm_theory.moments import MOST_PAIRS
from tbrm_theory.population import population_loss
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["evaluate_instance", "instance_behaviours", "instance_policies"]


def instance_policies(instance: Instance, solution: Solution) -> dict[str, PerLayerStateAction]:
    """``log π`` of every given policy, and of ``reference`` and ``optimal``."""
    built_in = {"reference": instance.mdp.log_reference, "optimal": solution.log_policy}
    return {**instance.policies, **built_in}


def instance_behaviours(instance: Instance, solution: Solution) -> dict[str, Behaviour]:
    """All that generates data: the policies, and the mixtures, one component drawn for each episode."""
    policies = instance_policies(instance, solution)
    behaviours: dict[str, Behaviour] = {name: MarkovBehaviour(log_policy) for name, log_policy in policies.items()}
    for name, parts in instance.mixtures.items():
        weights = tuple(weight for weight, _ in parts)
        behaviours[name] = MixtureBehaviour(weights, tuple(policies[policy] for _, policy in parts))
    return behaviours


def evaluate_instance(instance: Instance) -> dict[str, Any]:
    """The object of design.md; floats are JSON numbers that round-trip, infinities strings."""
    mdp, solution = instance.mdp, solve(instance.mdp)

    def table(tables: PerLayerStateAction) -> Any:
        return [_json(mdp.rows(h, layer)) for h, layer in enumerate(tables)]

    return {
        "v_star": [_json((mdp.beta * layer).tolist()) for layer in solution.v],
        "q_star": table(tuple(mdp.beta * layer for layer in solution.q)),
        "policy_star": table(tuple(log.exp() for log in solution.log_policy)),
        "objective_star": _scalar(solution.objective),
        "policies": {
            name: _evaluate_policy(instance, solution, log_policy)
            for name, log_policy in instance_policies(instance, solution).items()
        },
        "losses": {name: _evaluate_logits(instance, solution, logits) for name, logits in instance.logits.items()},
        "coverage": _evaluate_coverage(instance, solution),
    }


def _evaluate_policy(instance: Instance, solution: Solution, log_policy: PerLayerStateAction) -> dict[str, Any]:
    return {
        "objective": _scalar(objective(instance.mdp, log_policy)),
        "regret": _scalar(regret(instance.mdp, log_policy, solution=solution)),
        "kl_to_reference": _scalar(kl_to_reference(instance.mdp, log_policy)),
    }


def _evaluate_logits(instance: Instance, solution: Solution, logits: PerLayerStateAction) -> dict[str, Any]:
    mdp, log_policy = instance.mdp, tuple(soft_policy(table) for table in logits)
    return {
        "objective": _scalar(objective(mdp, log_policy)),
        "regret": _scalar(regret(mdp, log_policy, solution=solution)),
        "corollary4": _scalar(corollary4(mdp, logits, solution=solution)),
        "by_behaviour": {
            name: {
                "tbrm": _scalar(population_loss(mdp, logits, behaviour, loss="tbrm")),
                "brm": _scalar(population_loss(mdp, logits, behaviour, loss="brm")),
                "theorem2": _scalar(theorem2(mdp, logits, behaviour, solution=solution))
                if mdp.is_deterministic
                else None,
            }
            for name, behaviour in instance_behaviours(instance, solution).items()
        },
    }


def _evaluate_coverage(instance: Instance, solution: Solution) -> dict[str, Any]:
    """Every policy against all data; ``second_moment`` is null where its matrix would be too large."""
    mdp, policies = instance.mdp, instance_policies(instance, solution)
    stacked = tuple(torch.stack(tables) for tables in zip(*policies.values(), strict=True))  # a batch: one call for all
    small = sum(table.numel() for table in mdp.reference) <= MOST_PAIRS
    columns: dict[str, dict[str, Any]] = {}
    for mu, behaviour in instance_behaviours(instance, solution).items():
        ratio = c_inf(mdp, stacked, behaviour)
        columns[mu] = {
            "kappa": kappa(mdp, stacked, behaviour),
            "lemma1": lemma1(mdp, stacked, behaviour),
            "corollary6": mdp.horizon * ratio,
            "c_inf": ratio,
            "second_moment": second_moment(mdp, stacked, behaviour) if small else None,
        }
    return {
        f"{pi}|{mu}": {name: None if values is None else _scalar(values[i]) for name, values in found.items()}
        for i, pi in enumerate(policies)
        for mu, found in columns.items()
    }


def _scalar(value: Tensor) -> float | str:
    number: float | str = _json(value.item())
    return number


def _json(value: Any) -> Any:
    """Nested lists of floats with infinities as strings.

    Raises:
        ArithmeticError: a NaN, which would be a bug; it is never printed.
    """
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    if math.isnan(value):
        raise ArithmeticError("an exact quantity came out as NaN")
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value
