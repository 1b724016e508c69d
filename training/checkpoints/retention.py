"""Which checkpoints of a run are kept."""

from collections.abc import Mapping

from training import experiment


def kept(
  eval_losses: Mapping[int, float | None], config: experiment.CheckpointConfig
) -> set[int]:
  """Returns the steps to keep: the latest, the best, and every so many.

  Args:
    eval_losses: validation loss by step, None where it was not evaluated.
    config: how many of each.
  """
  steps = sorted(eval_losses)
  evaluated = {
    step: loss for step, loss in eval_losses.items() if loss is not None
  }
  # Of equally good ones the latest: it is also among those that are resumed.
  best = sorted(evaluated, key=lambda step: (evaluated[step], -step))
  chosen = {*steps[-config.keep_latest :], *best[: config.keep_best]}
  if config.keep_every_steps:
    chosen |= {step for step in steps if step % config.keep_every_steps == 0}
  return chosen
