"""The facts of a run that its sampler needs, and the maker of samplers.

`train.py` makes the sampler of a run and hands it to `training.run.run`:
training never imports inference. `evals/sampling.py` has the port.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from evals import sampling
from models import model_config as model_config_lib
from text import tokenizer as tokenizer_lib


class ModelOfRun(NamedTuple):
  """The facts of a run that a sampler needs before its first weights."""

  config: model_config_lib.ModelConfig
  tokenizer: tokenizer_lib.Tokenizer
  compute_dtype: str
  max_length: int  # tokens of the longest prompt with its completion
  max_sequences: int  # completions of a rollout batch
  numerics: str  # fast | invariant
  devices: tuple[jax.Device, ...]  # of the sampler, one at least


MakeSampler = Callable[[ModelOfRun], sampling.Sampler]
