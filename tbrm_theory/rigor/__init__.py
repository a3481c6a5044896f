"""Inequalities of theory.md decided on one instance in rational or ball arithmetic, by code that shares nothing with the torch code.

``decide("B3", instance)`` proves the statement for this instance, or its violation, or says that it could not. What has neither
exponential nor logarithm in it (κ, χ², C_∞ of given policies) is decided in rationals, the rest (regret, losses, π*) in Arb's
balls, with more digits until the sides are apart; Λ in a ball, and in rationals where the ball meets its bound. See
:mod:`tbrm_theory.rigor.statements` for the statements and the names an instance needs.
"""

from __future__ import annotations

from flint import ctx

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.rigor.decision import Decision, enclosure, verdict
from tbrm_theory.rigor.problem import ExactProblem
from tbrm_theory.rigor.statements import STATEMENTS, Statement

__all__ = ["STATEMENTS", "Decision", "Statement", "decide"]

PRECISIONS = (320, 640, 1280, 2560)
"""Bits tried one after the other: 96 digits to 770."""


def decide(statement: str, instance: Instance) -> Decision:
    """Decide a statement on an instance.

    Args:
        statement: an id of :data:`STATEMENTS`.
        instance: its policies, mixtures and logits named as :mod:`tbrm_theory.rigor.statements` says.

    Raises:
        InvalidInputError: no such statement, a name that the instance lacks, a policy with mass on an action that does not exist, or
            an instance that the statement does not speak of (stochastic transitions, a mixture).
    """
    if statement not in STATEMENTS:
        raise InvalidInputError("statement", f"expected one of {', '.join(STATEMENTS)}, found {statement!r}")
    chosen, problem = STATEMENTS[statement], ExactProblem(instance)
    if chosen.deterministic and not problem.deterministic:
        raise InvalidInputError("mdp", f"expected deterministic transitions for {statement}")
    if chosen.markov and "mu" in instance.mixtures:
        raise InvalidInputError("mixtures.mu", f"expected a policy mu for {statement}, which speaks of Markov data")
    for bits in PRECISIONS:
        with ctx.workprec(bits):
            sides = chosen.sides(problem)
            violated = verdict(sides, chosen.relation)
            decision = Decision(
                left=enclosure(sides.left),
                right=enclosure(sides.right),
                violated=violated,
                exact="rational" if sides.rational else "ball",
                digits=0 if sides.rational else ctx.dps,
            )
        if violated is not None:
            break
    return decision
