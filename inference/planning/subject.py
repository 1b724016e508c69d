"""The models that can be planned: a frozen directory, or a config alone."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, Protocol

import jax.numpy as jnp

from checks import paths
from frozen import (
  format as frozen_format,
  manifest as manifest_lib,
  stored_kernels,
)
from frozen.huggingface import config_json
from inference import drafts
from inference.engine import engine_config, execution
from models import flops, model_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """A model without its weights."""

  name: str
  config: model_config.ModelConfig
  dtype: str  # of the weights and of the computation
  num_params: int
  quantization: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: dict(stored_kernels.NONE)
  )

  def shapes(self) -> Any:
    """Returns the shapes of the weights, as they are stored."""
    floats = frozen_format.abstract_params(self.config, self.dtype)
    return stored_kernels.with_kernels(floats, self.quantization)

  def drafting(self, config: engine_config.EngineConfig) -> drafts.Memory:
    """Returns the memory of what drafts for the model with a config.

    Raises:
      FileNotFoundError, ValueError: see `drafts.memory`.
    """
    if config.speculation not in ('model', 'head'):
      return drafts.Memory()
    # The formulas of a plan know no kernel of a platform: a CPU has none.
    dtype, platform = jnp.dtype(self.dtype), 'cpu'
    backend = execution.choose(config, self.config, dtype, platform)
    return drafts.memory(config, self.config, dtype, backend, platform)


class Experiment(Protocol):
  """What a plan reads of an experiment: its model, and how it is frozen."""

  @property
  def name(self) -> str: ...

  @property
  def model(self) -> model_config.ModelConfig: ...

  @property
  def freeze(self) -> Any: ...


def of(
  directory: str | None,
  config: str | None,
  load_experiment: Callable[[str], Experiment],
) -> Subject:
  """Returns the model that --model or --config names.

  Args:
    directory: a frozen directory.
    config: a config.json, or an experiment.
    load_experiment: returns the experiment of a name.

  Raises:
    FileNotFoundError, ValueError: there is no such model, or both or none of
      them are given.
  """
  if directory is not None and config is None:
    return of_directory(directory)
  if config is None or directory is not None:
    raise ValueError(
      '--plan: got both or none of --model and --config, expected one of them'
    )
  config = paths.expanded('--config', config)
  if config.endswith('.json'):
    return of_config_json(config)
  found = load_experiment(config)
  return of_config(found.name, found.model, found.freeze.dtype)


def of_directory(directory: str) -> Subject:
  """Returns the model of a frozen directory; reads its manifest only.

  Raises:
    FileNotFoundError, ValueError: there is no such model.
  """
  manifest = manifest_lib.read(pathlib.Path(directory))
  return Subject(
    name=manifest.experiment,
    config=model_config.ModelConfig.from_dict(manifest.model),
    dtype=manifest.dtype,
    num_params=manifest.num_params,
    quantization=manifest.quantization,
  )


def of_config(
  name: str, config: model_config.ModelConfig, dtype: str
) -> Subject:
  """Returns a model that has no weights yet.

  Raises:
    ValueError: the config is none of a model.
  """
  config.validate()
  return Subject(
    name=name, config=config, dtype=dtype, num_params=flops.num_params(config)
  )


def of_config_json(path: str) -> Subject:
  """Returns the model of a config.json, as Hugging Face's models have it.

  Its dtype is the one that the file names, or else bfloat16.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or its family is not
      known.
  """
  place = pathlib.Path(path)
  if not place.is_file():
    raise FileNotFoundError(
      f'--config: got {path!r}, expected a file config.json, or an experiment'
      ' such as experiments/pretrain.py:8b'
    )
  values = config_json.read_object(place)
  family, config = config_json.read(values, path)
  named = values.get('torch_dtype') or values.get('dtype') or 'bfloat16'
  return of_config(f'{place.parent.name or family} ({family})', config, named)
