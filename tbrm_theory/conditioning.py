"""How steep and how flat a loss is around its optimum: the Gauss-Newton matrices of TBRM and BRM in tabular logits (theory.md X7).

Half the Hessian where the residual is 0: ``E_μ[∇f ∇fᵀ]`` for TBRM, ``E_μ Σ_h ∇res_h ∇res_hᵀ`` for BRM with ``∇res_h =
e_(h,s_h,a_h) - Σ_a π_θ(a|s_{h+1}) e_(h+1,s_{h+1},a)``. Both come from occupancies and kernels, without a trajectory.
TBRM's is singular along the gauge directions of I8, one for each state of a later layer; conditions are those of the
complement.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.dynamic_programming import admissible_logits, soft_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import flatten_tables, moment_matrix, occupancy
from tbrm_theory.population import LOSSES, forbidden
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["gauss_newton_matrix", "spectrum"]


def gauss_newton_matrix(
    mdp: RegularizedMDP, logits: PerLayerStateAction, log_behaviour: PerLayerStateAction, *, loss: str = "tbrm"
) -> Float[Tensor, "pairs pairs"]:
    """The Gauss-Newton matrix over all pairs ``(h,s,a)``, in the order of ``flatten_tables``.

    Args:
        log_behaviour: ``log μ`` of Markov data.
        loss: ``"tbrm"`` or ``"brm"``; BRM's residual is the sampled one.

    Raises:
        InvalidInputError: another loss, a batch of problems, logits or policies, or data with actions that do not exist.
    """
    if loss not in LOSSES:
        raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {loss!r}")
    if mdp.batch_shape or any(table.dim() != 2 for table in (*logits, *log_behaviour)):
        raise InvalidInputError("mdp", "expected one problem, one table of logits and one policy, found a batch")
    d = occupancy(mdp, log_behaviour)
    if bool(forbidden(mdp, d)):
        raise InvalidInputError("log_behaviour", "expected only actions that exist")
    policy = [soft_policy(table).exp() for table in admissible_logits(mdp, logits)]
    if loss == "tbrm":
        gauge = torch.block_diag(*(_spread(table) if h else _spread(0 * table) for h, table in enumerate(policy)))
        derivative = torch.eye(len(gauge), dtype=gauge.dtype, device=gauge.device) - gauge
        return derivative.mT @ moment_matrix(mdp, log_behaviour) @ derivative
    matrix = torch.diag(flatten_tables(d.state_action))
    end = 0
    for h, kernel in enumerate(mdp.transitions):
        pairs = d.state_action[h].numel()
        here = slice(end, end + pairs)
        end += pairs
        after = slice(end, end + d.state_action[h + 1].numel())
        own = torch.diag(d.state_action[h].flatten()).unflatten(-1, d.state_action[h].shape)
        joint = kernel.push(own)  # (pairs, S'), the law of a pair and its successor
        cross = (joint.unsqueeze(-1) * policy[h + 1]).flatten(-2)
        matrix[here, after] -= cross
        matrix[after, here] -= cross.mT
        weighted = policy[h + 1] * d.state[h + 1].unsqueeze(-1)
        matrix[after, after] += torch.block_diag(
            *(w.unsqueeze(-1) * p for w, p in zip(weighted, policy[h + 1], strict=True))
        )
    return matrix


def spectrum(
    mdp: RegularizedMDP,
    logits: PerLayerStateAction,
    log_behaviour: PerLayerStateAction,
    *,
    loss: str = "tbrm",
    scaled: bool = False,
) -> Float[Tensor, " eigenvalues"]:
    """The eigenvalues, rising, over the pairs that have data; for TBRM without the zeros of the gauge.

    Their last over their first is the condition number. ``μ`` must have full support on the states it reaches, so
    that nothing but the gauge is singular.

    Args:
        scaled: of the matrix scaled to a unit diagonal, as an optimiser with a step size for each parameter sees it.

    Raises:
        InvalidInputError: as :func:`gauss_newton_matrix`, or data that leave out actions in a state that they reach.
    """
    for h, (mass, valid) in enumerate(zip(occupancy(mdp, log_behaviour).state_action, mdp.valid, strict=True)):
        if bool(((mass == 0) & valid & (mass > 0).any(-1, keepdim=True)).any()):
            raise InvalidInputError(f"log_behaviour[{h}]", "expected every action of the states that are reached")
    matrix = gauss_newton_matrix(mdp, logits, log_behaviour, loss=loss)
    kept, gauge = _support(mdp, log_behaviour, loss)
    matrix = matrix[kept][:, kept]
    if scaled:
        scale = matrix.diagonal().rsqrt()
        matrix = matrix * scale.unsqueeze(-1) * scale
    return torch.linalg.eigvalsh(matrix)[gauge:]


def _support(mdp: RegularizedMDP, log_behaviour: PerLayerStateAction, loss: str) -> tuple[Int[Tensor, " kept"], int]:
    """The pairs with data, and how many directions of the gauge they hold; an only action is all gauge and left out."""
    kept, gauge = [], 0
    for h, mass in enumerate(occupancy(mdp, log_behaviour).state_action):
        visited = mass > 0
        if loss == "tbrm" and h > 0:
            visited = visited & (visited.sum(-1, keepdim=True) > 1)
            gauge += int(visited.any(-1).sum())
        kept.append(visited.flatten())
    return torch.cat(kept).nonzero().squeeze(-1), gauge


def _spread(policy: Float[Tensor, "states actions"]) -> Float[Tensor, "pairs pairs"]:
    """``1 πᵀ`` on each state."""
    return torch.block_diag(*(row.expand(len(row), -1) for row in policy))
