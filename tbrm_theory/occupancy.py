"""Where a policy goes: occupancies, trajectory laws and moment matrices (theory.md §0, I11-I12).

``d_h(s)`` and ``d_h(s,a)`` come from one forward sweep; in log space they never underflow, so that what has no data and what has
next to none stay apart. The moment matrix ``M = E_μ[φφᵀ]`` of the indicator features
``φ(τ) = Σ_h e_(h,s_h,a_h)`` gives ``E_μ[(Σ_h g_h)²] = gᵀ M g`` for every additive function; it is available as a dense matrix
and, for large problems, as a product with a vector that costs one backward and one forward sweep. Enumeration is for problems
small enough to list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import NextStateTable, PerLayerState, PerLayerStateAction, StateActionTable
from tbrm_theory.tables import check_layers, first_index, safe_log, side_by_side
from tbrm_theory.transitions import SparseTransition, Transition

__all__ = [
    "Enumeration",
    "LogOccupancy",
    "Occupancy",
    "enumerate_trajectories",
    "flatten_tables",
    "log_moment_matrix",
    "log_occupancy",
    "moment_matrix",
    "moment_product",
    "occupancy",
    "tables_on_support",
    "unflatten_tables",
]


@dataclass(frozen=True, eq=False)
class Occupancy:
    """``state[h][…, s] = d_h(s)`` and ``state_action[h][…, s, a] = d_h(s,a)``."""

    state: PerLayerState
    state_action: PerLayerStateAction


def occupancy(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Occupancy:
    """Both occupancies by one forward sweep. Mass on a non-existent action stays in its layer and goes no further."""
    check_layers(log_policy, mdp.reference, "log_policy")
    state, state_action = [mdp.initial], []
    for h, log in enumerate(log_policy):
        state_action.append(state[-1].unsqueeze(-1) * log.exp())
        if h < mdp.horizon - 1:
            existing = torch.where(mdp.valid[h], state_action[-1], 0.0)
            state.append(mdp.transitions[h].push(existing))
    return Occupancy(tuple(state), tuple(state_action))


@dataclass(frozen=True, eq=False)
class LogOccupancy:
    """``state[h][…, s] = log d_h(s)`` and ``state_action[h][…, s, a] = log d_h(s,a)``; ``-inf`` exactly where there is no mass."""

    state: PerLayerState
    state_action: PerLayerStateAction


def log_occupancy(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> LogOccupancy:
    """The logarithms of both occupancies, by a forward sweep in log space."""
    check_layers(log_policy, mdp.reference, "log_policy")
    state, state_action = [safe_log(mdp.initial)], []
    for h, log in enumerate(log_policy):
        state_action.append(state[-1].unsqueeze(-1) + log)
        if h < mdp.horizon - 1:
            existing = torch.where(mdp.valid[h], state_action[-1], -torch.inf)
            state.append(_log_push(mdp.transitions[h], existing))
    return LogOccupancy(tuple(state), tuple(state_action))


def _log_push(kernel: Transition, log_mass: StateActionTable) -> NextStateTable:
    """``log push(exp log_mass)``: a log-sum-exp over the edges into each state."""
    successors, probability = kernel.edges()
    flow = log_mass.unsqueeze(-1) + safe_log(probability)
    batch = flow.shape[:-3]
    flow = flow.flatten(-3)
    into = successors.expand(*batch, *successors.shape[-3:]).flatten(-3)
    top = flow.detach().new_full((*batch, kernel.shape[-1]), -torch.inf)
    top = top.scatter_reduce(-1, into, flow.detach(), "amax")
    shift = torch.where(top > -torch.inf, top, 0.0)
    total = torch.zeros_like(top).scatter_add(-1, into, (flow - shift.gather(-1, into)).exp())
    return safe_log(total) + shift


# -- vectors indexed by (h, s, a) --------------------------------------------------------------------------------


def flatten_tables(tables: PerLayerStateAction) -> Float[Tensor, "... pairs"]:
    """All layers side by side in one vector, batch dimensions first."""
    return side_by_side([table.flatten(-2) for table in tables])


def unflatten_tables(mdp: RegularizedMDP, vector: Float[Tensor, "... pairs"]) -> PerLayerStateAction:
    """The inverse of :func:`flatten_tables`, in the shapes of ``mdp``."""
    sizes = [table.shape[-2:] for table in mdp.reference]
    pieces = vector.split([size.numel() for size in sizes], dim=-1)
    return tuple(piece.unflatten(-1, size) for piece, size in zip(pieces, sizes, strict=True))


def tables_on_support(
    mdp: RegularizedMDP, tables: PerLayerStateAction, log_policy: PerLayerStateAction, where: str
) -> PerLayerStateAction:
    """The tables with 0 in place of what stands at actions that the policy never takes, where ``0 · ∞`` would be NaN.

    Raises:
        InvalidInputError: tables or a policy of other layers, or a number that is not finite at an action that is taken.
    """
    check_layers(log_policy, mdp.reference, "log_policy")
    check_layers(tables, mdp.reference, where)
    kept = tuple(torch.where(log > -torch.inf, table, 0.0) for table, log in zip(tables, log_policy, strict=True))
    for h, table in enumerate(kept):
        infinite = table.isinf()
        if bool(infinite.any()):
            raise InvalidInputError(f"{where}[{h}]{first_index(infinite)}", "expected a finite number")
    return kept


def moment_product(mdp: RegularizedMDP, log_policy: PerLayerStateAction, g: PerLayerStateAction) -> PerLayerStateAction:
    """``M g``: the tables ``E_μ[(Σ_k g_k) 1{s_h = s, a_h = a}]`` for Markov ``μ``, by one backward and one forward sweep.

    The suffix from ``(h, s, a)`` has conditional mean ``g_h + E m_{h+1}``; the prefix is carried forward as the mass-weighted
    sum ``c_h(s) = E_μ[(Σ_{k<h} g_k) 1{s_h = s}]``.
    """
    g = tables_on_support(mdp, g, log_policy, "g")
    probability = [log.exp() for log in log_policy]
    suffix: list[Tensor] = [g[-1]]
    for h in range(mdp.horizon - 2, -1, -1):
        mean = (probability[h + 1] * suffix[-1]).sum(-1)
        suffix.append(g[h] + mdp.transitions[h].expect(mean))
    suffix.reverse()
    mass, carried = mdp.initial, torch.zeros_like(mdp.initial)
    product = []
    for h in range(mdp.horizon):
        pair_mass = mass.unsqueeze(-1) * probability[h]
        pair_carried = carried.unsqueeze(-1) * probability[h]
        product.append(pair_carried + pair_mass * suffix[h])
        if h < mdp.horizon - 1:
            mass = mdp.transitions[h].push(pair_mass)
            carried = mdp.transitions[h].push(pair_carried + pair_mass * g[h])
    return tuple(product)


def moment_matrix(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Float[Tensor, "... pairs pairs"]:
    """``M = E_μ[φφᵀ]`` for Markov ``μ``: the joint probability that two pairs lie on one trajectory (theory.md I12).

    For each layer the law of later pairs given a pair is pushed forward, so the cost is ``H²/2`` layer products.
    """
    d = occupancy(mdp, log_policy).state_action
    batch = torch.broadcast_shapes(*(table.shape[:-2] for table in d))
    sizes = [table.shape[-2:].numel() for table in d]
    start = [sum(sizes[:h]) for h in range(mdp.horizon)]
    matrix = d[0].new_zeros(*batch, sum(sizes), sum(sizes))
    for h in range(mdp.horizon):
        rows = slice(start[h], start[h] + sizes[h])
        joint = torch.diag_embed(d[h].flatten(-2)).unflatten(-1, d[h].shape[-2:])  # (…, pair, S_h, A_h)
        matrix[..., rows, rows] = joint.flatten(-2)
        for k in range(h + 1, mdp.horizon):
            kernel = mdp.transitions[k - 1].behind_batch()
            joint = kernel.push(joint).unsqueeze(-1) * log_policy[k].exp().unsqueeze(-3)
            columns = slice(start[k], start[k] + sizes[k])
            matrix[..., rows, columns] = joint.flatten(-2)
            matrix[..., columns, rows] = joint.flatten(-2).transpose(-1, -2)
    return matrix


def log_moment_matrix(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Float[Tensor, "... pairs pairs"]:
    """The logarithms of :func:`moment_matrix`, ``-inf`` exactly where no trajectory has both pairs."""
    d = log_occupancy(mdp, log_policy).state_action
    batch = torch.broadcast_shapes(*(table.shape[:-2] for table in d))
    sizes = [table.shape[-2:].numel() for table in d]
    blocks: dict[tuple[int, int], Tensor] = {}
    for h in range(mdp.horizon):
        mass = d[h].flatten(-2).unsqueeze(-1)
        alone = torch.eye(sizes[h], dtype=torch.bool, device=mass.device)
        given = torch.where(alone, torch.zeros_like(mass), -torch.inf).unflatten(
            -1, d[h].shape[-2:]
        )  # log law of the pair given itself
        blocks[h, h] = mass + given.flatten(-2)
        for k in range(h + 1, mdp.horizon):
            existing = torch.where(mdp.valid[k - 1].unsqueeze(-3), given, -torch.inf)
            reached = _log_push(mdp.transitions[k - 1].behind_batch(), existing)
            given = reached.unsqueeze(-1) + log_policy[k].unsqueeze(-3)
            blocks[h, k] = mass + given.flatten(-2)
            blocks[k, h] = blocks[h, k].transpose(-1, -2)
    rows = [
        torch.cat([blocks[h, k].expand(*batch, sizes[h], sizes[k]) for k in range(mdp.horizon)], dim=-1)
        for h in range(mdp.horizon)
    ]
    return torch.cat(rows, dim=-2)


# -- enumeration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Enumeration:
    """Every feasible trajectory of one problem: indices, and the log-probability of start and transitions."""

    states: Int[Tensor, "trajectories horizon"]
    actions: Int[Tensor, "trajectories horizon"]
    log_dynamics: Float[Tensor, " trajectories"]

    def log_law(self, log_policy: PerLayerStateAction) -> Float[Tensor, "... trajectories"]:
        """``log P_π(τ)`` of every listed trajectory."""
        return self.log_dynamics + self.sum_along(log_policy)

    def sum_along(self, tables: PerLayerStateAction) -> Float[Tensor, "... trajectories"]:
        """``Σ_h g_h(s_h, a_h)`` on every listed trajectory."""
        if len(tables) != self.states.shape[-1]:
            raise InvalidInputError("tables", f"expected {self.states.shape[-1]} layers, found {len(tables)}")
        steps = [table[..., self.states[:, h], self.actions[:, h]] for h, table in enumerate(tables)]
        return torch.stack(torch.broadcast_tensors(*steps)).sum(0)


def enumerate_trajectories(mdp: RegularizedMDP, *, limit: int = 1_000_000) -> Enumeration:
    """List every trajectory of positive probability under the reference policy, layer by layer.

    Raises:
        InvalidInputError: the problem has batch dimensions, or more than ``limit`` trajectories.
    """
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    start = (mdp.initial > 0).nonzero().squeeze(-1)
    states, actions = start.unsqueeze(-1), start.new_empty(len(start), 0)
    log_dynamics = safe_log(mdp.initial[start])
    for h in range(mdp.horizon):
        row, action = mdp.valid[h][states[:, -1]].nonzero(as_tuple=True)
        states, actions = states[row], torch.cat([actions[row], action.unsqueeze(-1)], dim=-1)
        log_dynamics = log_dynamics[row]
        if h < mdp.horizon - 1:
            successors, probability = _distinct_edges(mdp.transitions[h])
            here = probability[states[:, -1], action]
            row, k = (here > 0).nonzero(as_tuple=True)
            following = successors[states[row, -1], action[row], k]
            log_dynamics = log_dynamics[row] + safe_log(here[row, k])
            states, actions = torch.cat([states[row], following.unsqueeze(-1)], dim=-1), actions[row]
        if len(states) > limit:
            raise InvalidInputError("mdp", f"expected at most {limit} trajectories to enumerate, found more")
    return Enumeration(states, actions, log_dynamics)


def _distinct_edges(kernel: Transition) -> tuple[Tensor, Tensor]:
    """The edges of a kernel, a successor that is listed several times once, with the sum of its probabilities."""
    successors, probability = kernel.edges()
    if isinstance(kernel, SparseTransition):
        same = successors.unsqueeze(-1) == successors.unsqueeze(-2)
        total = torch.where(same, probability.unsqueeze(-2), 0.0).sum(-1)
        first = same.to(torch.int64).argmax(-1) == torch.arange(same.shape[-1], device=same.device)
        probability = torch.where(first, total, 0.0)
    return successors, probability
