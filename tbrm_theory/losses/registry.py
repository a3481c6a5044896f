"""Every loss by name: what it is called with, where it comes from, and which scores it consumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from tbrm_theory.losses import group_losses as group
from tbrm_theory.losses import policy_gradient as gradient
from tbrm_theory.losses import step_residuals as step
from tbrm_theory.losses import trajectory_residuals as trajectory

__all__ = ["LOSSES", "RESIDUALS", "Loss"]


@dataclass(frozen=True)
class Loss:
    """``function(scores, beta=…, **options)``, with ``group_size=n`` too if ``needs_group``."""

    name: str
    function: Callable[..., Tensor]
    source: str
    """Paper and equation."""
    fields: tuple[str, ...]
    """The fields of ``TrajectoryScores`` that the value or the gradient depends on."""
    needs_group: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Keyword options and their defaults."""


_RATIO = ("log_policy", "log_reference", "mask")
_GAP = (*_RATIO, "trajectory_return")
_STEPS = (*_RATIO, "reward")
_SURROGATE = ("log_policy", "behaviour_log_policy", "mask", "trajectory_return")

_ALL = (
    Loss("tbrm", trajectory.tbrm_loss, "[Y] Eq. 4", (*_GAP, "initial_value")),
    Loss("tbrm-first-logit", trajectory.first_logit_loss, "[Y] Algorithm 1", (*_GAP, "first_logit")),
    Loss("tbrm-iterative", trajectory.iterative_loss, "[Y] App. F", (*_GAP, "frozen_initial_value")),
    Loss("reval", trajectory.reval_loss, "[R]", (*_GAP, "initial_value", "reference_initial_value")),
    Loss("brm", step.brm_loss, "[Y] Eq. 3", (*_STEPS, "value")),
    Loss("sql-one-step", step.sql_one_step_loss, "[Y] App. E; Guo et al. 2022", (*_STEPS, "frozen_value")),
    Loss("sql-multi-step", step.sql_multi_step_loss, "[Y] App. E; Guo et al. 2022", (*_STEPS, "frozen_value")),
    Loss(
        "sql-one-step-q",
        step.sql_one_step_q_loss,
        "[Y] App. E; Haarnoja et al. 2017",
        (*_STEPS, "value", "frozen_value"),
    ),
    Loss("sql-multi-step-q", step.sql_multi_step_q_loss, "[Y] App. E; Schulman et al. 2017", (*_STEPS, "value")),
    Loss("pcl-one-step", step.pcl_one_step_loss, "[Y] App. E; Nachum et al. 2017", (*_STEPS, "critic")),
    Loss("pcl-multi-step", step.pcl_multi_step_loss, "[Y] App. E; Nachum et al. 2017", (*_STEPS, "critic")),
    Loss("trajectory-balance", trajectory.trajectory_balance_loss, "Malkin et al. 2022", (*_GAP, "log_partition")),
    Loss("vargrad", group.vargrad_loss, "Richter et al. 2020", _GAP, needs_group=True),
    Loss("kimi", group.kimi_loss, "Kimi k1.5, §2.3.2; [Y] App. E", _GAP, needs_group=True),
    Loss("dro", trajectory.dro_loss, "Richemond et al. 2024 (DRO-V)", (*_GAP, "baseline")),
    Loss("a-star-po", trajectory.a_star_po_loss, "[A]", (*_GAP, "baseline")),
    Loss("pairwise", group.pairwise_loss, "[Y] App. E; Azar et al. 2023 (IPO)", _GAP, needs_group=True),
    Loss("dpo", group.dpo_loss, "Rafailov et al. 2023, Eq. 7", _GAP, needs_group=True),
    Loss("reinforce", gradient.reinforce_loss, "Williams 1992", _GAP),
    Loss(
        "rloo",
        gradient.rloo_loss,
        "Ahmadian et al. 2024",
        (*_GAP, "behaviour_log_policy"),
        needs_group=True,
        options=MappingProxyType({"clip": 0.2}),
    ),
    Loss(
        "grpo",
        gradient.grpo_loss,
        "Shao et al. 2024, Eq. 3",
        (*_SURROGATE, "log_reference"),
        needs_group=True,
        options=MappingProxyType({"clip": 0.2, "corrected_kl": False}),
    ),
    Loss(
        "dr-grpo",
        gradient.dr_grpo_loss,
        "Liu et al. 2025",
        (*_SURROGATE, "log_reference"),
        needs_group=True,
        options=MappingProxyType({"clip": 0.2, "corrected_kl": False}),
    ),
    Loss(
        "dapo",
        gradient.dapo_loss,
        "Yu et al. 2025, Eq. 8",
        _SURROGATE,
        needs_group=True,
        options=MappingProxyType({"clip": 0.2, "clip_higher": 0.28}),
    ),
    Loss(
        "ppo",
        gradient.ppo_loss,
        "Schulman et al. 2017",
        (*_STEPS, "behaviour_log_policy", "critic", "entropy"),
        options=MappingProxyType({"clip": 0.2, "gae_lambda": 1.0, "entropy_coefficient": 0.001}),
    ),
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ALL}
"""Every loss by name."""

RESIDUALS: dict[str, Callable[..., Tensor]] = {
    "tbrm": trajectory.tbrm_residual,
    "tbrm-first-logit": trajectory.first_logit_residual,
    "tbrm-iterative": trajectory.iterative_residual,
    "reval": trajectory.reval_residual,
    "brm": step.brm_residual,
    "sql-one-step": step.sql_one_step_residual,
    "sql-multi-step": step.sql_multi_step_residual,
    "sql-one-step-q": step.sql_one_step_q_residual,
    "sql-multi-step-q": step.sql_multi_step_q_residual,
    "pcl-one-step": step.pcl_one_step_residual,
    "pcl-multi-step": step.pcl_multi_step_residual,
    "trajectory-balance": trajectory.trajectory_balance_residual,
    "dro": trajectory.dro_residual,
    "a-star-po": trajectory.a_star_po_residual,
}
"""Every residual of a trajectory alone, or of its steps, by name; each takes ``(scores, *, beta)``."""
