"""The first tensor of a step that turned NaN or infinite, found by replay.

A non-finite loss is noticed some steps later, when it is fetched. By then its
state is gone: donated and overwritten. But every step of a run can be repeated
bit for bit from a checkpoint. So the last checkpoint is restored and the steps
up to the failing step are repeated. `training/diagnosis/tensor_checks.py` then
takes the failing step and looks at every tensor, in this order: the layers, the
loss, the backward pass and the optimizer's update. The step runs on the same
devices and with the same dropout. Healthy runs pay nothing for this.

Some tensors are not finite in healthy steps either, such as masks of -inf. They
are found in the step before and left out.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training import learner as learner_lib, state as state_lib
from training.diagnosis import tensor_checks, tensor_names
from training.reporting import reporter

_MAX_NAMED = 4  # leaves, or rows, in a line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
  """The objects that repeat steps of a run."""

  learner: learner_lib.Learner
  train_step: Callable[..., Any]  # compiled; donates its state
  batches: Iterator[Any]
  # Returns a placed state and its number of steps, and moves `batches` to the
  # same step.
  restart: Callable[[], tuple[state_lib.TrainState, int]]


def explained(
  error: reporter.NonFiniteError, replay: Replay
) -> reporter.NonFiniteError:
  """Returns the error, extended by the findings of a replay of its step.

  If the replay fails, the error says so; the failure does not hide the error.
  With several processes, all have the same error and all have to call this
  function.
  """
  # Frames of the traceback hold a state, and memory may hold only one state.
  traceback.clear_frames(error.__traceback__)
  try:
    found = _diagnose(error.step, replay)
  except Exception as failure:  # of any kind: the first error matters more
    reason = str(failure).partition('\n')[0]
    found = [
      f'the cause is not known: {type(failure).__name__} while the step was'
      f' repeated: {reason}'
    ]
  return reporter.NonFiniteError('\n  '.join([str(error), *found]), error.step)


def _diagnose(failed: int, replay: Replay) -> list[str]:
  """Returns the findings about step `failed`, as lines."""
  put_batch = replay.learner.placement.put_batch
  state, first = replay.restart()
  probe = _Probe(replay.learner)
  for step in range(first + 1, failed):
    batch = put_batch(next(replay.batches))
    if step == failed - 1:
      probe.learn_usual(state, batch)
    state, _ = replay.train_step(state, batch)
  batch = put_batch(next(replay.batches))
  seen = probe.look(state, batch)
  tensor = probe.first(seen)
  since = f'the checkpoint of step {first}' if first else 'the start'
  lines = [f'step {failed} was repeated from {since}, tensor by tensor:']
  lines += _state_lines(
    seen['before'], 'before the step the state is not finite already'
  )
  if tensor is not None:
    lines += _tensor_lines(tensor, probe.close_up(state, batch, tensor))
  if tensor is None or tensor_names.is_update(tensor):
    lines += _state_lines(seen['after'], 'the step leaves, not finite')
  _, metrics = replay.train_step(state, batch)
  return lines + _conclusion(metrics, tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CloseUp:
  """Details of a tensor that is not finite."""

  num_bad: float  # values that are not finite
  size: int  # all values
  largest: float  # magnitude of the finite values
  # Rows of the batch with non-finite values; empty if the tensor has no rows.
  rows: list[int]
  num_rows: int  # of the whole batch


class _Probe:
  """A train step whose tensors are watched."""

  def __init__(self, learner: learner_lib.Learner):
    # Without a pipeline, every layer is seen. A pipeline would be seen from
    # outside only, as kernels are.
    execution = dataclasses.replace(learner.model.execution, run_layers=None)
    self._learner = dataclasses.replace(
      learner, model=learner.model.clone(execution=execution)
    )
    self._watch: Any = None  # the `Watch` of the latest trace
    # Tensors that are not finite in a healthy step.
    self._usual: set[tensor_checks.Key] = set()
    self._compiled = learner.placement.compile_probe(self._build)

  def look(self, state: Any, batch: Any) -> dict[str, Any]:
    """Takes the step and returns its records, on the host.

    Returns:
      before, after: a summary [S] or [S, N] of each leaf of the state, by name,
        for S shards and N layers.
      records: for each shard, the record that `Watch.tensors` takes.
    """
    seen = jax.device_get(self._compiled(state, batch))
    num_shards = len(next(iter(seen['before'].values())))
    records = [
      jax.tree.map(lambda x, s=s: x[s], seen['record'])
      for s in range(num_shards)
    ]
    return {**seen, 'records': records}

  def learn_usual(self, state: Any, batch: Any) -> None:
    """Remembers the tensors that are not finite in a healthy step."""
    for record in self.look(state, batch)['records']:
      self._usual |= {
        tensor.key
        for tensor in self._watch.tensors(record)
        if not tensor.is_finite
      }

  def first(self, seen: dict[str, Any]) -> tensor_checks.Computed | None:
    """Returns the first tensor that is not finite, on any shard."""
    found = []
    for record in seen['records']:
      for order, tensor in enumerate(self._watch.tensors(record)):
        if not tensor.is_finite and tensor.key not in self._usual:
          found.append((order, tensor))
          break
    return min(found, key=lambda item: item[0])[1] if found else None

  def close_up(
    self, state: Any, batch: Any, tensor: tensor_checks.Computed
  ) -> _CloseUp:
    """Takes the step again and returns details of one non-finite tensor."""
    num_parts = self._learner.experiment.num_microbatches
    *_, num_rows, row_length = next(iter(batch.values())).shape
    num_rows //= num_parts
    chosen = [sight.is_finite for sight in tensor.outputs].index(False)

    def look(values):
      x = values[chosen]
      finite = jnp.isfinite(x)
      seen = {
        'num_bad': jnp.sum(~finite, dtype=jnp.float32),
        'largest': jnp.max(jnp.where(finite, jnp.abs(x), 0)),
      }
      if _has_rows(x.shape, num_rows, row_length):
        seen['rows'] = (~finite).reshape((num_rows, -1)).any(axis=1)
      return seen

    compiled = self._learner.placement.compile_probe(
      lambda *helpers: self._build_watch(*helpers).close_up(tensor.key, look)
    )
    index = tuple(index for _, index in tensor.loops)
    seen = {
      name: x[(slice(None), *index)]
      for name, x in jax.device_get(compiled(state, batch)).items()
    }
    part = tensor_names.microbatch(tensor)
    return _CloseUp(
      num_bad=float(seen['num_bad'].sum()),
      size=math.prod(tensor.outputs[chosen].shape) * len(seen['num_bad']),
      largest=float(seen['largest'].max()),
      num_rows=num_rows * num_parts * len(seen['num_bad']),
      # Micro-batches take rows in turn, see `_accumulate` in training/step.py.
      rows=[
        (shard * num_rows + row) * num_parts + part
        for shard, row in np.argwhere(seen.get('rows', np.zeros((0, 0))))
      ],
    )

  def _build(self, all_sum, shard_key):
    watch = self._watch = self._build_watch(all_sum, shard_key)

    def probe(state, batch):
      (new_state, _), record = watch(state, batch)
      return {
        'before': _summaries(state),
        'after': _summaries(new_state),
        'record': record,
      }

    return probe

  def _build_watch(self, all_sum, shard_key):
    return tensor_checks.Watch(
      self._learner.build_train_step(all_sum, shard_key),
      tensor_names.leaves(self._learner.abstract_state)
      + sorted(self._learner.batch_shapes()),
    )


def _summaries(state):
  """Returns a summary of each leaf by name: [], or [N] for stacked layers."""
  summaries = {}
  for name, leaf in zip(
    tensor_names.leaves(state), jax.tree.leaves(state), strict=True
  ):
    if tensor_checks.is_float(leaf):
      stacked = tensor_names.is_stacked(name) and leaf.ndim
      summary = tensor_checks.summary
      summaries[name] = (jax.vmap(summary) if stacked else summary)(leaf)
  return summaries


def _has_rows(shape, num_rows, row_length) -> bool:
  """Returns whether the first axis of a tensor is the rows of the batch."""
  if shape[:1] == (num_rows * row_length,):
    return True
  # Scores and heads of attention have rows, but may lack an axis of length T.
  return shape[:1] == (num_rows,) and (
    row_length in shape[1:] or len(shape) > 3
  )


def _tensor_lines(tensor, close_up) -> list[str]:
  out = next(sight for sight in tensor.outputs if not sight.is_finite)
  where = f', in {_rows(close_up)} of the batch' if close_up.rows else ''
  lines = [
    f'first not finite: {tensor_names.place(tensor)}: {tensor.operation} gives'
    f' {_shape(out)}, {close_up.num_bad:,.0f} of {close_up.size:,} values'
    f' ({close_up.num_bad / close_up.size:.2g}){where}; the largest of the'
    f' others is {close_up.largest:.3g}'
  ]
  inputs = [
    f'{sight.name or "values"} {_shape(sight)} up to {sight.largest:.3g}'
    for sight in tensor.inputs
  ]
  if inputs:
    lines.append(f'computed from {", ".join(inputs)}')
  return lines


def _state_lines(summaries, what) -> list[str]:
  names = []
  for name, stats in summaries.items():
    bad = (~np.isfinite(stats)).any(axis=0)  # on any shard
    if not bad.any():
      continue
    layers = np.flatnonzero(bad) if bad.ndim else []
    of_layers = ', '.join(map(str, layers[:_MAX_NAMED]))
    names.append(f'{name} (layer {of_layers})' if len(layers) else name)
  # The optimizer's state is computed before the weights.
  names.sort(key=lambda name: not name.startswith('opt_state'))
  if not names:
    return []
  more = len(names) - _MAX_NAMED
  rest = f' and {more} more' if more > 0 else ''
  return [f'{what}: {", ".join(names[:_MAX_NAMED])}{rest}']


def _conclusion(metrics, tensor) -> list[str]:
  values = {name: float(value) for name, value in metrics.items()}
  bad = {k: v for k, v in values.items() if not math.isfinite(v)}
  if not bad:
    return [
      f'the repeated step is finite: loss = {values["loss"]:.6g}, grad_norm ='
      f' {values["grad_norm"]:.6g} from the same state and batch; suspect the'
      ' hardware, and resume from the checkpoint'
    ]
  told = ', '.join(f'{name} = {value}' for name, value in bad.items())
  if tensor is None:
    return [f'it gives {told}, but every tensor that was seen is finite']
  return [f'it gives {told} again']


def _rows(close_up) -> str:
  rows = sorted(close_up.rows)
  if len(rows) == close_up.num_rows:
    return 'all rows'
  more = len(rows) - _MAX_NAMED
  rest = f' and {more} more' if more > 0 else ''
  named = ', '.join(map(str, rows[:_MAX_NAMED]))
  return f'row{"s" if len(rows) > 1 else ""} {named}{rest}'


def _shape(sight: tensor_checks.Sight) -> str:
  return f'{sight.dtype}{list(sight.shape)}'
