"""Experiment: everything that a training run is told, in one value.

A file in `experiments/` returns one; absl flags override its fields; the run
writes it to its workdir. The parts are defined beside the code that reads them.
"""

import dataclasses
from typing import Any

from data import data_config
from models import execution, model_config
from models.linear import quantized
from parallel import parallel_config
from training.evaluation import evals_config
from training.objectives import next_token, port
from training.optimizer import average, chain, spikes as spikes_lib

# See training/execution.py and models/linear/quantized.py.
ATTENTION = ('auto', 'reference', 'splash', 'cudnn')
MATMULS = ('float', *quantized.FORMATS)


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
  """When to save, and what to keep."""

  every_steps: int = 200  # also at the end, and when asked to stop
  keep_latest: int = 2
  keep_best: int = 1  # by validation loss; kept besides the latest
  keep_every_steps: int = 0  # keep these for good; 0 keeps none
  # Seconds that the cluster leaves a run between SIGTERM and SIGKILL.
  grace_s: float = 30.0


@dataclasses.dataclass(kw_only=True)
class FreezeConfig:
  """How the last step is handed over to life two."""

  enabled: bool = True
  dtype: str = 'float32'  # of the frozen params: float32 | bfloat16
  weights: str = 'auto'  # raw | average | auto: the average where one is kept
  temperature: float = 0.8  # generation defaults that travel along
  max_tokens: int = 128


@dataclasses.dataclass(kw_only=True)
class ExecutionConfig:
  """How the model is computed: what is traded, never what comes out."""

  remat: str = 'none'  # stored for backward: none | minimal | full | offload
  attention: str = 'auto'  # auto | reference | splash (TPU) | cudnn (GPU)
  matmul: str = 'float'  # operands: compute_dtype (float) | int8 | fp8

  def validate(self) -> None:
    """Raises ValueError for what no model can be computed with."""
    if self.remat not in execution.REMAT:
      raise ValueError(
        f'execution.remat: got {self.remat!r}, expected one of'
        f' {", ".join(execution.REMAT)}'
      )
    for name, allowed in (('attention', ATTENTION), ('matmul', MATMULS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'execution.{name}: got {getattr(self, name)!r}, expected one of'
          f' {", ".join(allowed)}'
        )


@dataclasses.dataclass(kw_only=True)
class Experiment:
  """One run of life one."""

  name: str  # a run may resume only a run of the same name
  model: model_config.ModelConfig
  data: data_config.DataConfig
  optimizer: chain.OptimizerConfig
  parallel: parallel_config.ParallelConfig = dataclasses.field(
    default_factory=parallel_config.ParallelConfig
  )
  execution: ExecutionConfig = dataclasses.field(
    default_factory=ExecutionConfig
  )
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  freeze: FreezeConfig = dataclasses.field(default_factory=FreezeConfig)
  # Frozen directory whose weights are the first of the run; '': random ones.
  init_from: str = ''
  # The loss and its hyper-parameters. Chosen in the file of an experiment; a
  # flag sets a field, as --config.objective.z_loss_weight=1e-4.
  objective: port.Objective = next_token.NextToken()
  spikes: spikes_lib.SpikeConfig = dataclasses.field(
    default_factory=spikes_lib.SpikeConfig
  )
  evals: evals_config.EvalsConfig = dataclasses.field(
    default_factory=evals_config.EvalsConfig
  )
  ema_decay: float = 0.0  # of an average of the weights, as 0.999; 0: none
  diagnose_non_finite: bool = True  # take a step that gave NaN again, and look
  seed: int = 0  # of initialisation, dropout and data order
  num_steps: int = 1000  # optimizer steps of the whole run
  num_microbatches: int = 1  # a batch is taken in so many parts
  compute_dtype: str = 'float32'  # of activations: float32 | bfloat16
  log_every_steps: int = 10
  eval_every_steps: int = 200  # also after the last step; 0: only then
  eval_batches: int = 0  # of the evaluation split; 0 takes all of it

  def validate(self) -> None:
    """Raises ValueError, naming the value, before anything is allocated."""
    self.model.validate()
    self.data.validate()
    self.parallel.validate()
    self.execution.validate()
    for name in ('num_steps', 'num_microbatches', 'log_every_steps'):
      _at_least(1, f'config.{name}', getattr(self, name))
    for name in ('eval_every_steps', 'eval_batches', 'seed'):
      _at_least(0, f'config.{name}', getattr(self, name))
    for name in ('every_steps', 'keep_latest'):
      _at_least(1, f'checkpoint.{name}', getattr(self.checkpoint, name))
    for name in ('keep_best', 'keep_every_steps'):
      _at_least(0, f'checkpoint.{name}', getattr(self.checkpoint, name))
    if not self.checkpoint.grace_s > 0:
      raise ValueError(
        f'checkpoint.grace_s: got {self.checkpoint.grace_s}, expected more'
        ' than 0 seconds'
      )
    _at_least(1, 'freeze.max_tokens', self.freeze.max_tokens)
    for name, value in (
      ('config.compute_dtype', self.compute_dtype),
      ('freeze.dtype', self.freeze.dtype),
    ):
      if value not in ('float32', 'bfloat16'):
        raise ValueError(f'{name}: got {value!r}, expected float32 or bfloat16')
    if not isinstance(self.objective, port.Objective):
      raise ValueError(
        f'config.objective: got {self.objective!r}, expected an objective of'
        ' training/objectives, as NextToken(z_loss_weight=1e-4)'
      )
    self.objective.validate()
    self.optimizer.validate(self.num_steps)
    self.spikes.validate()
    self.evals.validate(self.eval_every_steps)
    average.validate(self.optimizer.rule, self.ema_decay, self.freeze.weights)
    last_start = self.data.ramp[-1][0]
    if last_start >= self.num_steps:
      raise ValueError(
        f'data.batch_ramp: got a size from step {last_start}, expected one that'
        f' is reached in config.num_steps = {self.num_steps}; leave it out, or'
        ' train for longer'
      )
    for size in self.data.batch_sizes:
      if size % self.num_microbatches:
        name = 'size' if size == self.data.batch_size else 'ramp'
        raise ValueError(
          f'config.num_microbatches: got {self.num_microbatches}, expected a'
          f' divisor of the {size} rows of data.batch_{name}'
        )
    if self.data.row_length > self.model.max_length:
      raise ValueError(
        f'data.row_length: got {self.data.row_length}, expected at most'
        f' model.max_length = {self.model.max_length}'
      )

  def to_dict(self) -> dict[str, Any]:
    """Returns the experiment as JSON values; functions by qualified name.

    A frozen dataclass (a rule, an objective) has its qualified name besides its
    fields, as `type`: the name says which it is.
    """
    return _jsonable(self)


def _at_least(least: int, name: str, value: int) -> None:
  if value < least:
    raise ValueError(f'{name}: got {value}, expected at least {least}')


def _jsonable(value: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if value.__dataclass_params__.frozen:
      fields = {'type': type(value)} | fields
    return _jsonable(fields)
  if isinstance(value, dict):
    return {key: _jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_jsonable(item) for item in value]
  if callable(value):
    return f'{value.__module__}.{value.__qualname__}'
  return value
