"""Wiring: the prompts, batches and held-out prompts of a run with rollouts."""

from collections.abc import Callable
import dataclasses
import threading
from typing import Any, NamedTuple

from checks import expect
from data.examples import prompts as prompts_lib
from evals import sampling
from parallel import processes
from text import tokenizer as tokenizer_lib
from training import (
  experiment as experiment_lib,
  learner as learner_lib,
  state as state_lib,
)
from training.rollouts import (
  batches as batches_lib,
  devices,
  held_out as held_out_lib,
  rewards as rewards_lib,
  rollout_config,
  sampler as sampler_lib,
)
from training.rollouts.dialogues import dialogue as dialogue_lib
from training.rollouts.draws import drawing


class Wired(NamedTuple):
  """The parts of a run that its rollouts replace."""

  batches: batches_lib.RolloutBatches
  held_out: held_out_lib.HeldOut


def check(
  experiment: experiment_lib.Experiment,
  make_sampler: sampler_lib.MakeSampler | None,
) -> sampler_lib.MakeSampler:
  """Returns the maker of the sampler; refuses runs that cannot have one.

  Raises:
    ValueError: there is no sampler, several processes, or adapters.
  """
  if make_sampler is None:
    raise ValueError(
      'config.rollouts: got no sampler, expected one: this program trains on'
      ' fixed data; start the run with train.py'
    )
  expect.at_least('number of processes', processes.count(), 1)
  if processes.count() > 1:
    raise ValueError(
      f'config.rollouts: got {processes.count()} processes, expected one: the'
      ' sampler is an engine on one device; start a single process'
    )
  if experiment.adapter.rank:
    raise ValueError(
      f'adapter.rank: got {experiment.adapter.rank} with config.rollouts,'
      ' expected 0: the sampler takes whole weights; train all of them'
    )
  return make_sampler


def wire(
  experiment: experiment_lib.Experiment,
  learner: learner_lib.Learner,
  tokenizer: tokenizer_lib.Tokenizer,
  opened: tuple[Any, Any],
  *,
  template: str,
  stop_ids: tuple[int, ...],
  make_sampler: sampler_lib.MakeSampler,
) -> Wired:
  """Returns the batches of a run that samples, and its evaluation.

  Args:
    learner: the learner, with the spare ids of the tokenizer masked.
    opened: the records to train and to evaluate on.
    template: chat template of prompts; '' for the plain transcript.
    stop_ids: besides EOS, the ids that end an answer.

  Raises:
    ValueError: the prompts cannot be read or do not fit.
  """
  config, data = experiment.rollouts, experiment.data
  assert config is not None
  dialogue = _dialogue(config, tokenizer, template)
  train, held_out = _open_prompts(experiment, opened, tokenizer, template)
  group_size = rollout_config.group_size_of(experiment.objective)
  sampler = make_sampler(
    sampler_lib.ModelOfRun(
      config=learner.model.config,
      tokenizer=tokenizer,
      compute_dtype=experiment.compute_dtype,
      max_length=data.row_length,
      max_sequences=config.num_prompts * group_size,
      numerics=config.numerics,
      devices=devices.sampling(experiment),
    )
  )
  config = _with_weights(config, sampler)
  stop = prompts_lib.stop_strings(template)
  weights_of = _weights_of(learner)
  turn = threading.Lock()
  drawer = drawing.Drawer(
    config=config,
    prompts=train,
    group_size=group_size,
    seed=experiment.seed,
    stop_ids=stop_ids,
    stop=stop,
    dialogue=dialogue,
  )
  batches = batches_lib.RolloutBatches(
    experiment,
    drawer,
    pad_id=tokenizer.pad_id,
    sampler=sampler,
    turn=turn,
    weights_of=weights_of,
    annotate=(
      learner.compile_annotate_step()
      if experiment.objective.annotated
      else None
    ),
  )
  return Wired(
    batches,
    held_out_lib.HeldOut(
      config=config,
      prompts=held_out,
      sampler=sampler,
      turn=turn,
      weights_of=weights_of,
      stop_ids=stop_ids,
      stop=stop,
      dialogue=dialogue,
    ),
  )


def _open_prompts(
  experiment: experiment_lib.Experiment,
  opened: tuple[Any, Any],
  tokenizer: tokenizer_lib.Tokenizer,
  template: str,
) -> list[prompts_lib.Prompts]:
  """Returns the prompts to train and to evaluate on."""
  config, data = experiment.rollouts, experiment.data
  assert config is not None
  (train_source,) = data.train_sources()
  return [
    prompts_lib.open_prompts(
      source,
      tokenizer,
      template,
      name=named.name,
      most_tokens=data.row_length - config.most_tokens,
      too_long=data.too_long,
    )
    for source, named in zip(
      opened, (train_source, data.eval_source()), strict=True
    )
  ]


def _dialogue(
  config: rollout_config.RolloutConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  template: str,
) -> dialogue_lib.Dialogue | None:
  """Returns the encoder of episodes with several turns; None without turns."""
  if config.environment is None:
    return None
  return dialogue_lib.Dialogue.of(
    tokenizer, template, config.environment.schemas
  )


def _with_weights(
  config: rollout_config.RolloutConfig, sampler: sampling.Sampler
) -> rollout_config.RolloutConfig:
  """Returns the config, with the weights of reward models in its rewards."""
  rewards = rewards_lib.bind(
    config.rewards, lambda path: sampler.open_scorer(path)
  )
  return dataclasses.replace(config, rewards=rewards)


def _weights_of(
  learner: learner_lib.Learner,
) -> Callable[[state_lib.TrainState], Any]:
  return lambda state: learner.placement.whole(state).params
