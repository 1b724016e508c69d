"""Runs with a frozen base: only adapters, or only heads, are state.

    state.params         {'adapters': {layer: {a, b}}}, and heads if any
    state.frozen_params  {'init_from': variables of the base}

So gradients, moments, averages and checkpoints hold these alone. The base is
read again from its frozen directory when a run resumes, and its digest is
compared. The step computes with `joined` variables.
"""

from collections.abc import Mapping
from typing import Any

import jax

from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import peft_files
from models import adapter_config
from models.layers import adapters
from models.linear.stored import tree as stored_tree
from training import experiment as experiment_lib, step
from training.checkpoints import init_from

BASE = 'init_from'  # in `TrainState.frozen_params`, and in a lineage


def joined(config: adapter_config.AdapterConfig) -> step.Joined:
  """Returns the function that joins a state's params to their base, if any."""

  def join(params, frozen_params):
    if not frozen_params or BASE not in frozen_params:
      return params
    base = jax.lax.stop_gradient(frozen_params[BASE])
    if not config.rank:
      return {**params, **base}
    read = adapter_config.effective(
      config, base['params'], params[adapters.COLLECTION]
    )
    return {**params, **base, adapters.COLLECTION: read}

  return join


def first(
  config: adapter_config.AdapterConfig, key: jax.Array, base: Any
) -> dict[str, Any]:
  """Returns the params before the first step. Pure: jit or eval_shape it.

  Args:
    key: PRNG key of the run.
    base: variables of the frozen model.
  """
  if not config.rank:
    return {}  # heads alone
  key = jax.random.fold_in(key, 2)  # heads take 1
  return {adapters.COLLECTION: adapter_config.init(config, base['params'], key)}


def in_form(config: adapter_config.AdapterConfig, base: Any) -> Any:
  """Returns the variables of a base in the form that a run keeps."""
  if config.base == 'float':
    return base
  return {'params': stored_tree.quantise_kernels(base['params'], config.base)}


def check(experiment: experiment_lib.Experiment) -> None:
  """Raises ValueError for adapters that fit no base."""
  config = experiment.adapter
  if not config.rank:
    return
  if not experiment.init_from:
    raise ValueError(
      f"adapter.rank: got {config.rank} with config.init_from = '', expected a"
      ' frozen directory: an adapter is a change of weights that exist; set'
      ' config.init_from, or adapter.rank = 0'
    )
  if experiment.execution.matmul != 'float':
    raise ValueError(
      f'execution.matmul: got {experiment.execution.matmul} with adapter.rank ='
      f' {config.rank}, expected float: products with an adapter are not'
      ' quantised; adapter.base = int8 stores the frozen weights in 8 bits'
    )
  if experiment.freeze.enabled and not experiment.freeze.merge_adapter:
    # Checked now: merging after the last step would fail too late.
    base = frozen_format.open_directory(init_from.directory(experiment))
    peft_files.check_family(base)
  if config.base == 'float':
    return
  if experiment.model.num_experts:
    raise ValueError(
      f'adapter.base: got {config.base} with model.num_experts ='
      f' {experiment.model.num_experts}, expected float: products with experts'
      ' in fewer bits have no gradient; set adapter.base = float'
    )


def read_base(experiment: experiment_lib.Experiment) -> Any:
  """Returns the verified base of a run, as the run keeps it."""
  manifest = manifest_lib.read(init_from.directory(experiment))
  manifest.check_language_model('config.init_from', experiment.init_from)
  return in_form(experiment.adapter, init_from.read(experiment))


def check_base(
  experiment: experiment_lib.Experiment, recorded: Mapping[str, str]
) -> None:
  """Raises ValueError if a run would resume on another base."""
  if not experiment.is_base_frozen:
    return
  got = manifest_lib.read(init_from.directory(experiment)).weights_digest
  if recorded.get(BASE) != got:
    raise ValueError(
      f'config.init_from: got a base with weights {got[:12]}, expected'
      f' {recorded.get(BASE, "none")[:12]}, on which the run has trained'
      ' so far; set config.init_from back, or use another --workdir'
    )
