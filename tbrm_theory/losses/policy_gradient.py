"""Policy gradients: losses whose gradient is that of the expected reward, the KL penalty in the reward or beside it.

In reward units; ``beta`` is the coefficient of the KL penalty, as in ``J_β``. ``μ`` is the policy that sampled: its log-probabilities
are constants, and so are advantages. ``group_size`` consecutive trajectories share their first state.

Sources: Williams 1992 (REINFORCE); Ahmadian et al., arXiv 2402.14740 (RLOO); Shao et al., arXiv 2402.03300 (GRPO); Liu et al.,
arXiv 2503.20783 (Dr. GRPO); Yu et al., arXiv 2503.14476 (DAPO); Schulman et al., arXiv 1707.06347 (PPO).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses.trajectory_residuals import trajectory_log_ratio
from tbrm_theory.losses.trajectory_scores import (
    StepResidual,
    TrajectoryScores,
    checked,
    grouped,
    needed,
    step_temperature,
    temperature,
    trajectory_sum,
    unmasked,
)

__all__ = ["dapo_loss", "dr_grpo_loss", "grpo_loss", "ppo_loss", "reinforce_loss", "rloo_loss"]


def reinforce_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``-mean_τ A(τ) log π_θ(τ)`` with ``A = r(τ) - β log π_θ(τ)/π_ref(τ)`` a constant, ``(…)``.

    For trajectories of ``π_θ`` the gradient's mean is ``-∇J_β(π_θ)`` (theory.md I9); there is no baseline.
    """
    penalty = temperature(beta, scores) * trajectory_log_ratio(scores)
    advantage = (scores.trajectory_return - penalty).detach()
    return checked(-(advantage * trajectory_sum(scores.log_policy, scores)).mean(-1), scores, "loss")


def rloo_loss(
    scores: TrajectoryScores, *, beta: float | Tensor, group_size: int, clip: float = 0.2
) -> Float[Tensor, "..."]:
    """``-mean_τ min(w A, clip(w, 1 ± clip) A)`` with ``w = π_θ(τ)/μ(τ)``, ``(…)``.

    ``A_i = R_i - mean_{j≠i} R_j`` in the group, ``R = r(τ) - β log μ(τ)/π_ref(τ)`` (Ahmadian et al.). At ``w = 1`` the gradient
    is ``(β/2) ∇VarGrad``.
    """
    behaviour = needed(scores.behaviour_log_policy, "behaviour_log_policy", "RLOO").detach()
    penalty = temperature(beta, scores) * trajectory_sum(behaviour - scores.log_reference, scores)
    rewards = grouped(scores.trajectory_return - penalty, group_size)
    others = (rewards.sum(-1, keepdim=True) - rewards) / (group_size - 1)
    advantage = (rewards - others).flatten(-2).detach()
    log_ratio = trajectory_sum(scores.log_policy - behaviour, scores)
    return checked(-_clipped(log_ratio, advantage, clip, clip).mean(-1), scores, "loss")


def grpo_loss(
    scores: TrajectoryScores,
    *,
    beta: float | Tensor,
    group_size: int,
    clip: float = 0.2,
    corrected_kl: bool = False,
) -> Float[Tensor, "..."]:
    """``-mean_τ mean_h [min(w_h A, clip(w_h, 1 ± clip) A) - β k3_h]`` with ``w_h = π_θ/μ(a_h|s_h)``, ``(…)``.

    ``A = (r - mean)/(std + 1e-4)`` of the group, std with n - 1; ``k3 = π_ref/π_θ - log π_ref/π_θ - 1`` (Shao et al., Eq. 3, 4).

    Args:
        corrected_kl: multiply ``k3`` by ``w_h``. For ``μ = π_θ`` the value is the same, and the gradient becomes that of
            ``KL(π_θ ‖ π_ref)`` in each state visited, the law of the states held, where it was that of ``KL(π_ref ‖ π_θ)``.
    """
    gain = _token_gain(scores, _group_advantage(scores, group_size, normalised=True), clip, clip, "GRPO")
    gain = gain - step_temperature(beta, scores) * _k3(scores, corrected=corrected_kl, why="GRPO")
    lengths = scores.mask.sum(-1)
    return checked(-(trajectory_sum(gain, scores) / lengths).mean(-1), scores, "loss")


def dr_grpo_loss(
    scores: TrajectoryScores,
    *,
    beta: float | Tensor,
    group_size: int,
    clip: float = 0.2,
    corrected_kl: bool = False,
) -> Float[Tensor, "..."]:
    """``-mean_τ Σ_h [min(w_h A, clip(w_h, 1 ± clip) A) - β k3_h]`` with ``A = r - mean`` of the group, ``(…)``.

    GRPO without its two normalisations (Liu et al.): no std, and no length. Implementations divide the sum by a constant,
    the longest response allowed.
    """
    gain = _token_gain(scores, _group_advantage(scores, group_size, normalised=False), clip, clip, "Dr. GRPO")
    gain = gain - step_temperature(beta, scores) * _k3(scores, corrected=corrected_kl, why="Dr. GRPO")
    return checked(-trajectory_sum(gain, scores).mean(-1), scores, "loss")


def dapo_loss(
    scores: TrajectoryScores,
    *,
    beta: float | Tensor,
    group_size: int,
    clip: float = 0.2,
    clip_higher: float = 0.28,
) -> Float[Tensor, "..."]:
    """``-Σ_τ Σ_h min(w_h A, clip(w_h, 1 - clip, 1 + clip_higher) A)`` over the number of tokens, ``(…)`` (Yu et al., Eq. 8).

    GRPO's advantage; there is no KL penalty, so ``beta`` has no effect. That groups of equal rewards are drawn anew is the sampler's
    part.
    """
    temperature(beta, scores)
    gain = _token_gain(scores, _group_advantage(scores, group_size, normalised=True), clip, clip_higher, "DAPO")
    return checked(-trajectory_sum(gain, scores).sum(-1) / scores.mask.sum((-1, -2)), scores, "loss")


def ppo_loss(
    scores: TrajectoryScores,
    *,
    beta: float | Tensor,
    clip: float = 0.2,
    gae_lambda: float = 1.0,
    entropy_coefficient: float = 0.001,
) -> Float[Tensor, "..."]:
    """``-mean_τ Σ_h [min(w_h A_h, clip(w_h, 1 ± clip) A_h) + c H(π_θ(·|s_h))] + mean_τ Σ_h (V_φ(s_h) - G_h)²``, ``(…)``.

    In units of β the reward of a step is ``r_h/β - log μ/π_ref(a_h|s_h)``, ``δ_h = reward_h + V_φ(s_{h+1}) - V_φ(s_h)``, the
    generalised advantage ``Â_h = Σ_{k≥h} λ^{k-h} δ_k`` (no discount); ``A_h = β Â_h`` and ``G_h = V_φ(s_h) + Â_h`` are constants.
    The critic has its own parameters, so its squared error needs no coefficient beside its learning rate.
    """
    if not 0 <= entropy_coefficient < math.inf:
        raise InvalidInputError("entropy_coefficient", f"expected a number of at least 0, found {entropy_coefficient}")
    behaviour = needed(scores.behaviour_log_policy, "behaviour_log_policy", "PPO").detach()
    critic = unmasked(needed(scores.critic, "critic", "PPO"), scores)
    entropy = trajectory_sum(needed(scores.entropy, "entropy", "PPO"), scores)
    reward = unmasked(needed(scores.reward, "reward", "PPO"), scores) / step_temperature(beta, scores)
    reward = reward - unmasked(behaviour - scores.log_reference, scores)
    estimate = _generalised_advantage(reward, critic, gae_lambda).detach()
    target = critic.detach() + estimate
    gain = _token_gain(scores, step_temperature(beta, scores) * estimate, clip, clip, "PPO")
    policy = trajectory_sum(gain, scores) + entropy_coefficient * entropy
    error = trajectory_sum((critic - target).square(), scores)
    return checked((error - policy).mean(-1), scores, "loss")


def _clipped(log_ratio: Tensor, advantage: Tensor, lower: float, higher: float) -> Tensor:
    """``min(w A, clip(w, 1 - lower, 1 + higher) A)``, element by element."""
    for name, width in (("clip", lower), ("clip_higher", higher)):
        if not width >= 0:
            raise InvalidInputError(name, f"expected a width of at least 0, found {width}")
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - lower, 1 + higher) * advantage)


def _token_gain(scores: TrajectoryScores, advantage: Tensor, lower: float, higher: float, why: str) -> StepResidual:
    """The clipped surrogate of every token; ``advantage`` is ``(…, N, H)``, or ``(…, N, 1)``: the same for a whole response."""
    behaviour = needed(scores.behaviour_log_policy, "behaviour_log_policy", why).detach()
    return _clipped(unmasked(scores.log_policy - behaviour, scores), advantage, lower, higher)


def _group_advantage(
    scores: TrajectoryScores, group_size: int, *, normalised: bool
) -> Float[Tensor, "... trajectories 1"]:
    """``r - mean`` of the group, over ``std + 1e-4`` if normalised; a constant."""
    returns = grouped(scores.trajectory_return.detach(), group_size)
    advantage = returns - returns.mean(-1, keepdim=True)
    if normalised:
        advantage = advantage / (returns.std(-1, keepdim=True) + 1e-4)
    return advantage.flatten(-2).unsqueeze(-1)


def _k3(scores: TrajectoryScores, *, corrected: bool, why: str) -> StepResidual:
    """``exp(x) - x - 1`` with ``x = log π_ref/π_θ(a_h|s_h)``, which is ``≥ 0`` and has the KL divergence as its mean under ``π_θ``."""
    log_ratio = unmasked(scores.log_reference - scores.log_policy, scores)
    estimate = log_ratio.exp() - log_ratio - 1
    if not corrected:
        return estimate
    behaviour = needed(scores.behaviour_log_policy, "behaviour_log_policy", why).detach()
    return estimate * unmasked(scores.log_policy - behaviour, scores).exp()


def _generalised_advantage(reward: StepResidual, critic: StepResidual, decay: float) -> StepResidual:
    """``Σ_{k≥h} λ^{k-h} δ_k`` as one product with the triangle of powers of ``λ``; 0 on padding, where ``δ`` is."""
    if not 0 <= decay <= 1:
        raise InvalidInputError("gae_lambda", f"expected a number from 0 to 1, found {decay}")
    change = reward + torch.nn.functional.pad(critic[..., 1:], (0, 1)) - critic
    steps = torch.arange(change.shape[-1], device=change.device)
    ahead = (steps.unsqueeze(-1) - steps).to(change.dtype)  # [k, h]
    powers = torch.where(ahead >= 0, decay ** ahead.clamp(min=0), 0.0)
    return change @ powers
