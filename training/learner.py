"""The learner: model, optimizer and their placement on devices.

It holds everything that an experiment says except its data, which
training/assemble.py adds. `train.py --plan` stops here: building a learner
allocates no arrays.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hardware import compilation_cache, peaks, xla_options
from models import (
  axes,
  execution as execution_lib,
  flops,
  param_shapes,
  transformer,
)
from parallel import placement as placement_lib
from training import (
  adapters,
  execution,
  experiment as experiment_lib,
  state as state_lib,
  step as step_lib,
)
from training.frozen_inputs import frozen_models as frozen_models_lib
from training.optimizer import chain, spikes

_FROZEN = ('frozen_params',)
# (state, batch of host arrays) -> arrays of the same rows
AnnotateStep = Callable[
  [state_lib.TrainState, Mapping[str, np.ndarray]], dict[str, np.ndarray]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
  """A model, its optimizer and their devices, before any value exists."""

  experiment: experiment_lib.Experiment
  model: transformer.Transformer
  frozen_models: Mapping[str, transformer.Transformer]  # of the objective
  schedule: Callable[[Any], Any]  # from a step to its learning rate
  optimizer: optax.GradientTransformation
  placement: placement_lib.Placement
  # Shapes and dtypes of a whole state, as a checkpoint has it.
  abstract_state: state_lib.TrainState
  # Analytic FLOPs of the forward and the backward pass of the trained model.
  flops_per_token: float
  joined: step_lib.Joined  # the base and its adapters, if the run trains some
  max_documents: int | None  # of a row, see `make`

  @property
  def num_params(self) -> int:
    """Returns the number of trained parameters."""
    return sum(x.size for x in jax.tree.leaves(self.abstract_state.params))

  @property
  def any_rows_model(self) -> transformer.Transformer:
    """The model for rows with any documents, which the data did not pack."""
    return self.model.clone(
      execution=execution.choose(self.experiment, self.placement, 0)
    )

  def masking(self, spare_ids: tuple[tuple[int, int], ...]) -> 'Learner':
    """Returns the learner, with models that mask ids without a token.

    Args:
      spare_ids: ids that the run's tokenizer, shared by its frozen models,
        does not use.
    """

    def mask(model):
      config = dataclasses.replace(model.config, spare_ids=spare_ids)
      return model.clone(config=config)

    return dataclasses.replace(
      self,
      model=mask(self.model),
      frozen_models={name: mask(m) for name, m in self.frozen_models.items()},
    )

  def init(self, key: jax.Array) -> state_lib.TrainState:
    """Returns the state before the first step, on the devices.

    Reads the objective's frozen models, if it needs any.
    """
    # Without the mesh: a model is initialised on a single token.
    model = self.model.clone(execution=execution_lib.Execution())
    frozen_params = self._read_frozen()
    init = functools.partial(
      _first_state, self.experiment, model, self.optimizer
    )
    if frozen_params is None:
      return self.placement.init(lambda key: init(key, None), key)
    layout = jax.tree.map(
      lambda leaf: leaf.sharding,
      self.placement.abstract_whole().replace(frozen_params=None),
    )
    state = jax.jit(init, out_shardings=layout)(
      key, frozen_params.get(adapters.BASE)
    )
    return self.placement.restored(state.replace(frozen_params=frozen_params))

  def init_with(self, key: jax.Array, params: Any) -> state_lib.TrainState:
    """Returns the state before the first step, on the devices."""
    abstract = self.placement.abstract_whole().replace(frozen_params=None)
    own = {name: abstract.params[name] for name in params}
    init = jax.jit(
      functools.partial(
        state_lib.init_with, self.optimizer, **_state_options(self.experiment)
      ),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
      donate_argnums=1,
    )
    return self.placed(init(key, frozen_models_lib.place(params, own)))

  def placed(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns the state as steps take it, with the weights of frozen models."""
    return self.placement.restored(
      dataclasses.replace(state, frozen_params=self._read_frozen())
    )

  def _read_frozen(self) -> dict[str, Any] | None:
    """Returns the weights of frozen models, placed; None if there are none."""
    abstract = self.placement.abstract_whole().frozen_params
    if abstract is None:
      return None
    experiment, found = self.experiment, {}
    sources = frozen_models_lib.needed(
      experiment.objective, experiment.init_from
    )
    for name, like in abstract.items():
      if name == adapters.BASE:
        params = adapters.read_base(experiment)
      else:
        config = self.frozen_models[name].config
        params = frozen_models_lib.read(sources[name], config)
      found[name] = frozen_models_lib.place(params, like)
    return found

  def peak_flops_per_s(self) -> float:
    """Returns the peak FLOP/s of all devices in the compute dtype."""
    dtype = jnp.dtype(self.experiment.compute_dtype).name
    return sum(
      peaks.peaks(device).flops_per_s[dtype]
      for device in self.placement.devices
    )

  def build_train_step(self, all_sum: Any, shard_key: Any) -> Any:
    """Builds the step for `placement.compile_train` and `lower_train`."""
    return step_lib.make_train_step(
      self.model,
      self.experiment.objective,
      self.optimizer,
      frozen_models=self.frozen_models,
      joined=self.joined,
      num_microbatches=self.experiment.num_microbatches,
      ema_decay=self.experiment.ema_decay,
      all_sum=all_sum,
      shard_key=shard_key,
    )

  def compile_train_step(self) -> step_lib.TrainStep:
    """Returns the train step on the run's devices. Donates its state."""
    return self.placement.compile_train(
      self.build_train_step, xla_options.of(self.placement.devices)
    )

  def compile_eval_step(self) -> Callable[..., dict[str, Any]]:
    """Returns the evaluation step on the run's devices.

    It takes params and a batch, and if the objective needs frozen models, the
    `frozen_params` of a state.
    """
    return self.placement.compile_eval(
      lambda all_sum, _: step_lib.make_eval_step(
        self.model,
        self.experiment.objective,
        frozen_models=self.frozen_models,
        joined=self.joined,
        all_sum=all_sum,
      ),
      self.frozen_fields,
    )

  def compile_annotate_step(self) -> AnnotateStep:
    """Returns the function that adds arrays to batches that were sampled.

    It takes a state and a batch of host arrays, the `batch_spec` of the
    objective but its `annotated`. The rows may come from several steps: a
    multiple of data.batch_size rows. It returns the arrays `annotated`, on the
    host, float32 with the shape and the order of the batch. It computes the
    rows as the train step does, batch by batch and part by part.
    """
    experiment, data = self.experiment, self.experiment.data
    shape = data.batch_size, data.row_length
    names = set(experiment.objective.batch_spec())
    names -= set(experiment.objective.annotated)
    annotate_step = self.placement.compile_eval(
      lambda all_sum, _: step_lib.make_annotate_step(
        self.model,
        experiment.objective,
        num_places=math.prod(shape),
        frozen_models=self.frozen_models,
        joined=self.joined,
        num_microbatches=experiment.num_microbatches,
        all_sum=all_sum,
      ),
      self.frozen_fields,
    )
    places_BT = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)

    def annotate(state, batch):
      _check_rows(batch, names, shape)
      frozen = [getattr(state, name) for name in self.frozen_fields]
      parts = []
      for first in range(0, len(batch['tokens']), data.batch_size):
        rows = slice(first, first + data.batch_size)
        arrays = {name: batch[name][rows] for name in names}
        arrays['places'] = places_BT
        placed = self.placement.put_batch(arrays)
        parts.append(annotate_step(state.params, placed, *frozen))
      return {
        name: np.concatenate(
          [np.asarray(p[name]).reshape(shape) for p in parts]
        )
        for name in experiment.objective.annotated
      }

    return annotate

  @property
  def frozen_fields(self) -> tuple[str, ...]:
    """The fields of a state, beside params, that an evaluation reads."""
    return () if self.abstract_state.frozen_params is None else _FROZEN

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a batch; of the last, if batches grow."""
    data = self.experiment.data
    sizes = {'B': data.batch_size, 'T': data.row_length}
    return {
      name: jax.ShapeDtypeStruct(
        (
          *(sizes[axis] for axis in spec.axes),
          *([spec.width] * bool(spec.width)),
        ),
        spec.dtype,
      )
      for name, spec in self.experiment.objective.batch_spec().items()
    }


def make(
  experiment: experiment_lib.Experiment,
  devices: Sequence[jax.Device] | None = None,
  max_documents: int | None = None,
) -> Learner:
  """Builds the learner of a validated experiment.

  Args:
    devices: devices of the run, or of an ahead-of-time target; None: all
      devices of this process's platform.
    max_documents: most documents of a row of training and evaluation data,
      padding counted as one; 0: unknown. None: as the packing says.

  Raises:
    ValueError: model, batch and devices do not fit each other.
  """
  # JAX may have a cache whose directory the environment alone has set.
  compilation_cache.leave_out_collectives()
  experiment = execution.settled(experiment, devices or jax.devices())
  dtype = jnp.dtype(experiment.compute_dtype)
  model = transformer.Transformer(experiment.model, dtype)
  adapters.check(experiment)
  base = _abstract_base(experiment, model)

  def abstract(optimizer):
    return _abstract_state(experiment, model, optimizer, base)

  optimizer = chain.make_optimizer(
    experiment.optimizer,
    experiment.num_steps,
    experiment.model,
    abstract(optax.identity()).params,
    is_staged=experiment.parallel.stage > 1,
  )
  optimizer = spikes.skipping(experiment.spikes, optimizer)
  abstract_state = abstract(optimizer)
  execution.check_model(experiment)
  frozen_as = _frozen_as(experiment)
  frozen_models = {
    name: transformer.Transformer(own.model, dtype)
    for name, own in frozen_as.items()
  }
  frozen_params = _abstract_frozen(frozen_as, frozen_models, base)
  abstract_state = abstract_state.replace(frozen_params=frozen_params or None)
  placement = placement_lib.make(
    experiment.parallel,
    abstract_state,
    state_lib.logical_axes(
      abstract_state, axes.param_axes(abstract_state.params)
    ),
    devices,
  )
  execution.check_batch(experiment, placement.num_batch_shards)

  def choose(own: experiment_lib.Experiment) -> execution_lib.Execution:
    return execution.choose(own, placement, max_documents)

  return Learner(
    experiment=experiment,
    model=model.clone(execution=choose(experiment)),
    frozen_models={
      name: frozen.clone(execution=choose(frozen_as[name]))
      for name, frozen in frozen_models.items()
    },
    schedule=chain.make_schedule(experiment.optimizer, experiment.num_steps),
    optimizer=optimizer,
    placement=placement,
    abstract_state=abstract_state,
    flops_per_token=flops.train_flops_per_token(
      experiment.model,
      experiment.data.row_length,
      is_frozen=base is not None,
      is_read_only=experiment.objective.trains_heads_alone,
    ),
    joined=adapters.joined(experiment.adapter),
    max_documents=max_documents,
  )


def _check_rows(
  batch: Mapping[str, np.ndarray], names: set[str], shape: tuple[int, int]
) -> None:
  """Refuses rows that the program of `compile_annotate_step` cannot take."""
  if missing := sorted(names - set(batch)):
    raise ValueError(
      f'batch: got arrays {", ".join(sorted(batch))}, expected'
      f' {", ".join(missing)} too; make them with the rows'
    )
  rows, length = batch['tokens'].shape
  if not rows or rows % shape[0] or length != shape[1]:
    raise ValueError(
      f'batch: got {rows} rows of {length} tokens, expected a multiple of'
      f' data.batch_size = {shape[0]} rows of data.row_length = {shape[1]};'
      ' fill the last rows with padding'
    )


def _abstract_frozen(
  frozen_as: Mapping[str, experiment_lib.Experiment],
  frozen_models: Mapping[str, transformer.Transformer],
  base: Any,
) -> dict[str, Any]:
  """Returns shapes and dtypes of the weights that a step only reads."""
  for own in frozen_as.values():
    execution.check_model(own)
  frozen_params = {
    name: state_lib.abstract_params(frozen)
    for name, frozen in frozen_models.items()
  }
  if base is not None:
    frozen_params[adapters.BASE] = base
  return frozen_params


def _frozen_as(
  experiment: experiment_lib.Experiment,
) -> dict[str, experiment_lib.Experiment]:
  """Returns the experiment of each frozen model, as if it were trained."""
  return {
    name: dataclasses.replace(
      experiment,
      model=frozen_models_lib.config_of(
        name, source, experiment.model.vocab_size
      ),
    )
    for name, source in frozen_models_lib.needed(
      experiment.objective, experiment.init_from
    ).items()
  }


def _abstract_base(
  experiment: experiment_lib.Experiment, model: transformer.Transformer
) -> Any:
  """Returns the shapes of the frozen base of a run; None: it has none."""
  if not experiment.is_base_frozen:
    return None
  return jax.eval_shape(
    functools.partial(adapters.in_form, experiment.adapter),
    state_lib.abstract_params(model),
  )


def _first_state(
  experiment: experiment_lib.Experiment,
  model: transformer.Transformer,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  base: Any,
) -> state_lib.TrainState:
  """Returns the state before the first step. Pure: jit or eval_shape it.

  Args:
    base: weights below the state's adapters or heads; None: the state has the
      weights.
  """
  options = _state_options(experiment)
  if base is None:
    return state_lib.init(model, optimizer, key, **options)
  params = adapters.first(experiment.adapter, key, base)
  return state_lib.init_with(optimizer, key, params, **options)


def _abstract_state(
  experiment: experiment_lib.Experiment,
  model: transformer.Transformer,
  optimizer: optax.GradientTransformation,
  base: Any,
) -> Any:
  """Returns the shapes and dtypes of `_first_state`."""

  def first(key, params):
    if base is not None:
      return _first_state(experiment, model, optimizer, key, params)
    options = _state_options(experiment)
    return state_lib.init_with(optimizer, key, params, **options)

  params = param_shapes.of(experiment.model) if base is None else base
  return jax.eval_shape(first, jax.random.key(0), params)


def _state_options(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  """Returns the parts of a state that depend on the experiment."""
  return {
    'has_average': experiment.ema_decay > 0,
    'make_heads': functools.partial(
      experiment.objective.init_heads, experiment.model
    ),
  }
