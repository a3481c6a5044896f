"""An instance: a problem, with policies, mixtures of them and logits by name; the file format of design.md.

Policies are tables ``log π``. Mass on an action that does not exist is allowed: it costs an infinite KL where
it is reached. Logits of such actions mean nothing; they are ``-inf`` here and ``null`` in a file. A mixture
is a list of ``(weight, policy name)``, one of which is drawn for a whole episode. Every instance has the
policies ``reference`` and ``optimal`` without listing them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbrm_theory.dynamic_programming import admissible_logits, check_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import Field, path_below, read_json, write_json
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.mdp_format import ragged_table
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import first_index, normalised, safe_log

__all__ = ["BUILT_IN_POLICIES", "Instance"]

BUILT_IN_POLICIES = ("reference", "optimal")
"""The policies that every instance has."""


@dataclass(frozen=True, eq=False)
class Instance:
    """One problem and what is evaluated on it.

    Raises:
        InvalidInputError: a batch of problems, a table that does not fit the problem, a row that is no
            distribution, a logit of an existing action that is not a finite number, a mixture of unknown
            policies, or a name that is empty, holds ``|``, is built in, or is both a policy and a mixture.
    """

    mdp: RegularizedMDP
    policies: Mapping[str, PerLayerStateAction] = field(default_factory=dict)
    """``log π`` by name."""
    mixtures: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)
    """``(weight, policy name)`` pairs by name."""
    logits: Mapping[str, PerLayerStateAction] = field(default_factory=dict)
    """``logit_θ`` by name; ``-inf`` where the action does not exist, whatever was given."""
    probabilities: Mapping[str, PerLayerStateAction] = field(init=False, repr=False)
    """``π`` by name. A file's own numbers are kept, since ``exp(log π)`` is not ``π`` to the last bit."""

    def __post_init__(self) -> None:
        mdp = self.mdp
        if mdp.batch_shape:
            raise InvalidInputError("mdp", f"expected one problem, found a batch of {tuple(mdp.batch_shape)}")
        _check_names(self.policies, self.mixtures, self.logits)
        for name, log_policy in self.policies.items():
            where = path_below("policies", name)
            check_policy(mdp, log_policy, where)
            _check_listed(mdp, log_policy, where)
        for name, table in self.logits.items():
            _check_unbatched(table, path_below("logits", name))
        set_field = object.__setattr__  # the fields are frozen for everyone but the constructor
        set_field(self, "policies", dict(self.policies))
        set_field(self, "mixtures", {name: _checked_mixture(self, name) for name in self.mixtures})
        set_field(
            self,
            "logits",
            {n: admissible_logits(mdp, t, path_below("logits", n)) for n, t in self.logits.items()},
        )
        set_field(self, "probabilities", {n: _probabilities(log, n) for n, log in self.policies.items()})

    @classmethod
    def from_probabilities(
        cls,
        mdp: RegularizedMDP,
        policies: Mapping[str, PerLayerStateAction],
        mixtures: Mapping[str, Sequence[tuple[float, str]]],
        logits: Mapping[str, PerLayerStateAction],
    ) -> Instance:
        """An instance whose policies are given as tables ``π``, which are kept bit for bit."""
        probabilities = {
            name: tuple(normalised(table, f"{path_below('policies', name)}[{h}]") for h, table in enumerate(tables))
            for name, tables in policies.items()
        }
        logs = {name: tuple(safe_log(table) for table in tables) for name, tables in probabilities.items()}
        instance = cls(mdp, logs, mixtures, logits)
        object.__setattr__(instance, "probabilities", probabilities)
        return instance

    # -- file format (design.md) -------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Instance:
        """Read an instance file.

        Raises:
            InvalidInputError: names the path of the first malformed field and what was expected there.
            OSError: the file cannot be read.
        """
        return cls.from_field(read_json(path))

    @classmethod
    def from_field(cls, document: Field) -> Instance:
        """Read a parsed instance file; ``policies``, ``mixtures`` and ``logits`` may be absent."""
        mdp = RegularizedMDP.from_field(document)
        absent = [~valid for valid in mdp.valid]
        nowhere = [None] * mdp.horizon
        return cls.from_probabilities(
            mdp,
            {name: _read_tables(mdp, entry, nowhere) for name, entry in _section(document, "policies").items()},
            {name: _read_mixture(entry) for name, entry in _section(document, "mixtures").items()},
            {name: _read_tables(mdp, entry, absent) for name, entry in _section(document, "logits").items()},
        )

    def to_document(self) -> dict[str, Any]:
        """The instance as JSON data; loading it gives bit-identical tables, in the file's own shape."""
        rows = self.mdp.rows
        return self.mdp.to_document() | {
            "policies": {
                name: [rows(h, table) for h, table in enumerate(tables)] for name, tables in self.probabilities.items()
            },
            "mixtures": {name: [[weight, policy] for weight, policy in parts] for name, parts in self.mixtures.items()},
            "logits": {
                name: [_null_where_absent(rows(h, table)) for h, table in enumerate(tables)]
                for name, tables in self.logits.items()
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the instance file, atomically."""
        write_json(path, self.to_document())


# -- checks ------------------------------------------------------------------------------------------------


def _check_names(policies: Mapping[str, Any], mixtures: Mapping[str, Any], logits: Mapping[str, Any]) -> None:
    tables = {"policies": policies, "mixtures": mixtures, "logits": logits}
    for section, table in tables.items():
        for name in table:
            where = path_below(section, name)
            if not name:
                raise InvalidInputError(where, "expected a name, found an empty one")
            if "|" in name:
                raise InvalidInputError(where, 'expected a name without "|", which separates two names')
            if section != "logits" and name in BUILT_IN_POLICIES:
                raise InvalidInputError(where, f"expected another name: every instance has the policy {name!r}")
            if section == "mixtures" and name in policies:
                raise InvalidInputError(where, f"expected another name: {name!r} is a policy already")


def _check_unbatched(tables: PerLayerStateAction, where: str) -> None:
    for h, table in enumerate(tables):
        if table.dim() != 2:
            raise InvalidInputError(f"{where}[{h}]", f"expected shape (states, actions), found {tuple(table.shape)}")


def _check_listed(mdp: RegularizedMDP, log_policy: PerLayerStateAction, where: str) -> None:
    """Refuse mass on padding: a file has no cells beyond the actions that a ragged row lists."""
    _check_unbatched(log_policy, where)
    for h, counts in enumerate(mdp.action_counts or ()):
        table = log_policy[h]
        padding = torch.arange(table.shape[-1]) >= torch.tensor(counts).unsqueeze(-1)
        bad = padding.to(table.device) & (table > -torch.inf)
        if bool(bad.any()):
            raise InvalidInputError(
                f"{where}[{h}]{first_index(bad)}", "expected no mass beyond the actions of the state"
            )


def _checked_mixture(instance: Instance, name: str) -> list[tuple[float, str]]:
    where, parts = path_below("mixtures", name), instance.mixtures[name]
    if not parts:
        raise InvalidInputError(where, "expected at least one (weight, policy) pair, found none")
    for i, (_, policy) in enumerate(parts):
        if policy not in instance.policies and policy not in BUILT_IN_POLICIES:
            known = ", ".join((*instance.policies, *BUILT_IN_POLICIES))
            raise InvalidInputError(f"{where}[{i}][1]", f"expected the name of a policy ({known}), found {policy!r}")
    weights = normalised(torch.tensor([weight for weight, _ in parts], dtype=torch.float64), where)
    return [(weight, policy) for weight, (_, policy) in zip(weights.tolist(), parts, strict=True)]


def _probabilities(log_policy: PerLayerStateAction, name: str) -> PerLayerStateAction:
    """``exp log π`` with sums so exact that they stay as they are when read again."""
    where = path_below("policies", name)
    return tuple(normalised(table.exp(), f"{where}[{h}]") for h, table in enumerate(log_policy))


# -- parts of a file ---------------------------------------------------------------------------------------


def _section(document: Field, key: str) -> dict[str, Field]:
    found = document.mapping().get(key)
    return {} if found is None else found.mapping()


def _read_tables(mdp: RegularizedMDP, tables: Field, optional: Sequence[Tensor | None]) -> PerLayerStateAction:
    """One table for each layer, in the file's own shape; ``null`` is read as 0 where ``optional``."""
    layers = tables.items(mdp.horizon, "layers")
    assert mdp.action_counts is not None  # a problem that was read has them
    return tuple(
        ragged_table(layer, counts, null)
        for layer, counts, null in zip(layers, mdp.action_counts, optional, strict=True)
    )


def _read_mixture(mixture: Field) -> list[tuple[float, str]]:
    parts = [part.items(2, "entries, [weight, policy]") for part in mixture.items(of="[weight, policy] pairs")]
    return [(weight.probability(), policy.text()) for weight, policy in parts]


def _null_where_absent(rows: list[list[float]]) -> list[list[float | None]]:
    return [[None if logit == -torch.inf else logit for logit in row] for row in rows]
