"""Training language models with the loss that the rest of the package checks; needs the extra ``llm``.

Nothing else of the package imports it. The mathematics stays in :mod:`tbrm_theory.losses`: what is here turns a model's
logits into :class:`~tbrm_theory.losses.TrajectoryScores` and leaves generation, distribution and logging to TRL.
"""
