"""Turns what an experiment says into the objects that run it, each once.

Below this file nothing knows of experiments: functions receive the objects, or
the plain numbers, that they need.
"""

from collections.abc import Callable, Iterable
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from data import pipeline, sources
from models import axes, flops, transformer
from parallel import device_peaks, placement as placement_lib
from text import tokenizer as tokenizer_lib
from training import (
  config as config_lib,
  optimizer as optimizer_lib,
  state as state_lib,
  step as step_lib,
  workdir as workdir_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """Everything a run is made of."""

  source: sources.Source
  tokenizer: tokenizer_lib.Tokenizer
  batches: pipeline.TrainBatches
  eval_batches: Iterable[pipeline.Batch]
  model: nn.Module
  schedule: Callable[[Any], Any]  # learning rate of a step
  optimizer: optax.GradientTransformation
  placement: placement_lib.Placement
  num_params: int
  flops_per_token: float  # analytic, of training

  def init(self, key: jax.Array) -> state_lib.TrainState:
    """Returns the state before the first step, on the devices."""
    return self.placement.init(
      lambda key: state_lib.init(self.model, self.optimizer, key), key
    )

  def peak_flops_per_s(self) -> float:
    """Returns what all devices together can do at best in the model's dtype."""
    dtype = jnp.dtype(self.model.dtype).name  # type: ignore[attr-defined]
    return sum(
      device_peaks.peaks(device).flops_per_s[dtype]
      for device in self.placement.devices
    )


def assemble(experiment: config_lib.Experiment, workdir: pathlib.Path) -> Parts:
  """Builds the parts of a run.

  Raises:
    ValueError, FileNotFoundError: the data cannot be opened, the vocabulary
      does not fit the model, or the model does not fit the devices.
  """
  source = experiment.data.open_split(experiment.data.train_split)
  eval_source = experiment.data.open_split(experiment.data.eval_split)
  tokenizer = workdir_lib.tokenizer(workdir, experiment, source)
  model = transformer.Transformer(
    experiment.model, jnp.dtype(experiment.compute_dtype)
  )
  optimizer = optimizer_lib.make_optimizer(
    experiment.optimizer, experiment.num_steps
  )
  abstract_state = jax.eval_shape(
    lambda key: state_lib.init(model, optimizer, key), jax.random.key(0)
  )
  placement = placement_lib.make(
    experiment.parallel,
    abstract_state,
    state_lib.logical_axes(
      abstract_state, optimizer, axes.param_axes(abstract_state.params)
    ),
  )
  _check_batch(experiment, placement.num_batch_shards)
  return Parts(
    source=source,
    tokenizer=tokenizer,
    batches=pipeline.train_batches(
      source, tokenizer, experiment.data, seed=experiment.seed
    ),
    eval_batches=pipeline.eval_batches(eval_source, tokenizer, experiment.data),
    model=model,
    schedule=optimizer_lib.make_schedule(
      experiment.optimizer, experiment.num_steps
    ),
    optimizer=optimizer,
    placement=placement,
    num_params=sum(x.size for x in jax.tree.leaves(abstract_state.params)),
    flops_per_token=flops.train_flops_per_token(
      experiment.model, experiment.data.row_length
    ),
  )


def compile_train_step(
  parts: Parts, experiment: config_lib.Experiment
) -> step_lib.TrainStep:
  """Returns the train step on the run's devices. Donates its state."""
  return parts.placement.compile_train(
    lambda all_sum, shard_key: step_lib.make_train_step(
      parts.model,
      experiment.objective,
      parts.optimizer,
      num_microbatches=experiment.num_microbatches,
      all_sum=all_sum,
      shard_key=shard_key,
    )
  )


def compile_eval_step(
  parts: Parts, experiment: config_lib.Experiment
) -> Callable[[Any, Any], dict[str, Any]]:
  """Returns the evaluation step on the run's devices."""
  return parts.placement.compile_eval(
    lambda all_sum, _: step_lib.make_eval_step(
      parts.model, experiment.objective, all_sum=all_sum
    )
  )


def _check_batch(experiment: config_lib.Experiment, num_shards: int) -> None:
  rows = experiment.data.batch_size // experiment.num_microbatches
  if rows % num_shards:
    raise ValueError(
      f'data.batch_size: got {experiment.data.batch_size} rows in'
      f' {experiment.num_microbatches} micro-batches of {rows}, expected a'
      f' multiple of the {num_shards} devices that split the batch; change'
      ' data.batch_size, config.num_microbatches or parallel'
    )
