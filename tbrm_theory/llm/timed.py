"""TRL's own trainers, with the seconds of every step split as in [Y] Fig. 2(b); they train as they would without it.

A*-PO's estimates of the value, which it makes before the first step from the reference's responses, belong to no step.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from tbrm_theory.llm.part_timer import PartTimer
from tbrm_theory.llm.reference_trainer import ReferenceTrainer, StepSeconds

__all__ = ["timed"]


def timed(trainer: type[Any]) -> type[Any]:
    """A subclass of one of TRL's trainers that measures; this project's trainers do so already."""
    if issubclass(trainer, ReferenceTrainer):
        return trainer

    class Timed(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.timer = PartTimer()
            super().__init__(*args, **kwargs)
            self.add_callback(StepSeconds(self.timer, self._metrics["train"]))

        def __getstate__(self) -> Any:
            """Refused: ``datasets`` names what A*-PO keeps of its data after everything that the filter knows, the trainer too.

            Both models would be pickled for it. Where that fails, the name is a random one.
            """
            raise TypeError("a trainer is not pickled: it holds its models")

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with self.timer.part("rollout"):
                return super()._generate(*args, **kwargs)

        def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            # A*-PO has no method that generates alone.
            with self.timer.part("other" if hasattr(trainer, "_generate") else "rollout"):
                return super()._prepare_inputs(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with self.timer.part("other"):
                return super()._calculate_rewards(*args, **kwargs)

        def _get_sequence_logps(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            with self.timer.part("reference") if model is self.ref_model else nullcontext():
                return super()._get_sequence_logps(model, *args, **kwargs)

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():  # the update itself
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            with self.timer.part("reference" if model is self.ref_model else "old_log_probs"):
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.timer.part("update"):
                return super().training_step(*args, **kwargs)

    Timed.__name__ = Timed.__qualname__ = trainer.__name__
    return Timed
