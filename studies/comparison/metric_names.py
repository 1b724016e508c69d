"""The metrics that a run will write, and the better direction of each.

They are known before any training, so that a misspelt metric of a sweep is
refused before a run starts.
"""

import jax

from checks import expect
from studies.comparison import run_values
from training import (
  experiment as experiment_lib,
  learner as learner_lib,
  step as step_lib,
)
from training.evaluation import evals_config
from training.objectives import port

_ALWAYS = 'loss'
_LOWER = 'loss', 'bits_per_byte', 'perplexity', 'seconds_per_step', 'nll'
_HIGHER = (
  'accuracy',
  'reward',
  'tokens_per_s',
  'positions_per_s',
  'mfu',
  'positions_mfu',
)
_REWARD = 'reward/'


def direction_of(metric: str) -> str | None:
  """Returns minimize or maximize; None: the name does not say."""
  if metric.startswith(_REWARD):
    return 'maximize'
  name = metric.removeprefix('average_').rpartition('/')[2]
  if name in _LOWER:
    return 'minimize'
  return 'maximize' if name in _HIGHER else None


def check(
  experiment: experiment_lib.Experiment, metric: str, name: str = 'metric'
) -> None:
  """Refuses a metric that no run of an experiment writes.

  Scores of tasks and parts of rewards are checked up to their slash: the rest
  of the name is known only when they are measured.

  Raises:
    ValueError: there is no such metric.
  """
  plain = metric.removeprefix('average_')
  prefixes = [f'{evals_config.name_of(t)}/' for t in experiment.evals.tasks]
  known = {_ALWAYS}
  if experiment.rollouts is not None:
    known |= {'reward', 'length', 'truncated'}
    prefixes.append(_REWARD)
  elif experiment.objective.predicts_text:
    known.add('bits_per_byte')
  if plain == metric and (
    metric in known
    or metric in run_values.SPEEDS
    or metric.startswith(tuple(prefixes))
  ):
    return
  if experiment.rollouts is None:
    known |= _of_objective(experiment)
  if experiment.ema_decay or experiment.optimizer.rule.keeps_average:
    known |= {f'average_{each}' for each in known}
  allowed = [
    *sorted(known),
    *(f'{prefix}SCORE' for prefix in prefixes),
    *run_values.SPEEDS,
  ]
  meant = expect.meant(metric, allowed).removeprefix('; ')
  expect.one_of(name, metric, allowed, meant)


def _of_objective(experiment: experiment_lib.Experiment) -> set[str]:
  """Returns the figures that the evaluation step reports beside its loss."""
  learner = learner_lib.make(experiment)
  sums = jax.eval_shape(
    step_lib.make_eval_step(
      learner.model,
      experiment.objective,
      frozen_models=learner.frozen_models,
      joined=learner.joined,
    ),
    learner.abstract_state.params,
    learner.batch_shapes(),
    learner.abstract_state.frozen_params,
  )
  return {name for name, each in sums.items() if isinstance(each, port.Mean)}
