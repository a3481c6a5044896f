"""Every numbered statement of theory.md as a claim that can be checked, and can fail.

``comparison`` says what it means that two numbers agree, ``registry`` what a claim is, ``cases`` on which problems claims are
tried, ``by_hand`` is the code that the package is compared with, ``verification`` runs claims over families. The claims
themselves are one file for each section of theory.md, imported here so that they are registered.
"""

from __future__ import annotations

from tbrm_theory.claims import (
    convergence,
    corrected_residual,
    counterexamples,
    coverage_growth,
    family,
    finite_sample,
    held_targets,
    identities,
    linear_classes,
    linearisation,
    loss_identities,
    measure_change,
    mixture_data,
    noisy_rewards,
    noisy_transitions,
    outcome_reward,
    own,
    points_of_rest,
    rates,
    regret_bounds,
    residual_identities,
    sample_minimisers,
    starting_points,
    uncovered_actions,
)
from tbrm_theory.claims.cases import Case, make_case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import CLAIMS, Claim, select
from tbrm_theory.claims.verification import Outcome, Verdict, verify

__all__ = [
    "CLAIMS",
    "REGISTERED_IN",
    "Case",
    "Claim",
    "Comparison",
    "Outcome",
    "Verdict",
    "make_case",
    "select",
    "verify",
]

REGISTERED_IN = (
    identities,
    residual_identities,
    loss_identities,
    measure_change,
    linearisation,
    regret_bounds,
    finite_sample,
    convergence,
    counterexamples,
    sample_minimisers,
    rates,
    mixture_data,
    uncovered_actions,
    coverage_growth,
    noisy_transitions,
    starting_points,
    outcome_reward,
    corrected_residual,
    own,
    linear_classes,
    noisy_rewards,
    family,
    points_of_rest,
    held_targets,
)
"""The modules whose import adds claims to :data:`CLAIMS`."""
