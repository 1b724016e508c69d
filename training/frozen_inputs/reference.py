"""Log-probabilities of frozen models for the data of a run, computed once.

An objective names them in `logprobs_needed`. Before the first step, each frozen
model computes log p(target) of every token of the training and the evaluation
rows. The results are an array of each batch from then on: no step and no epoch
computes them again. They are kept in the data directory:

    logprobs/<key>/           a derived directory (storage/derived.py)
      logprobs.bin            float32, one value per id of the token store
    logprobs/<key>.rows/      what an unfinished computation has so far

The key is a hash of the weights, the tokens, their layout in rows and the
numerics; so another run with the same data and reference reads them too. A run
that is stopped in between goes on where it was.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checks import paths
from data import batches as batches_lib, rows as rows_lib
from models import axes, transformer
from parallel import placement as placement_lib, processes
from storage import atomic, derived
from training import (
  adapters,
  execution,
  experiment as experiment_lib,
  state as state_lib,
)
from training.evaluation import model_port
from training.frozen_inputs import frozen_models
from training.objectives import port

Say = Callable[[str], None]
_FORMAT = 1
_VALUES = 'logprobs.bin'
_READ = 'tokens', 'targets', 'positions', 'segment_ids'
# Seconds between two parts on disk, which is what a kill can cost.
_SECONDS_BETWEEN_PARTS = 60.0


class Computed(NamedTuple):
  """The log-probabilities of one source of rows."""

  source: str
  array: str  # in batches
  weights: str  # digest of the frozen model's weights
  forward_passes: int  # of this start of the run; 0: all were on disk


def add_logprobs(
  experiment: experiment_lib.Experiment,
  sources_of_rows: Sequence[rows_lib.Rows],
  spare_ids: tuple[tuple[int, int], ...],
  say: Say = lambda _: None,
) -> tuple[list[rows_lib.Rows], tuple[Computed, ...]]:
  """Returns the rows with the log-probabilities that the objective needs.

  A collective: all processes compute them together.

  Args:
    experiment: validated.
    sources_of_rows: of the training sources, and of the evaluation split.
    spare_ids: ids of the model without a token, see `Learner.masking`.
    say: receives a line about each source.

  Raises:
    ValueError: the reference cannot be read, the rows have no fixed layout, or
      the data directory cannot be written.
  """
  found, computed = list(sources_of_rows), []
  for array, source in experiment.objective.logprobs_needed.items():
    source = frozen_models.resolved(source, experiment.init_from)
    # Made at its first use: known values need no weights.
    scorer = functools.cache(
      functools.partial(_Scorer, experiment, array, source, spare_ids)
    )
    for i, rows in enumerate(found):
      path, done = _of_source(experiment, rows, array, source, scorer, say)
      found[i] = rows.with_array(array, path)
      computed.append(done)
  return found, tuple(computed)


def _of_source(
  experiment, rows, array, source, scorer, say
) -> tuple[pathlib.Path, Computed]:
  """Returns the file with one value per id of a source's store."""
  if rows.is_random:
    raise ValueError(
      'data.packing: got windows, whose rows start at random tokens, with the'
      f' objective {type(experiment.objective).__name__}, expected another'
      ' packing: the log-probabilities of a reference are computed once, of'
      ' tokens with a fixed context'
    )
  weights = frozen_models.digest_of(array, source)
  directory = _directory(experiment, rows, source, weights)
  passes = 0
  # Processes may have a data directory each, of which one is complete.
  if processes.agree(not directory.is_dir()):
    passes = _compute(experiment, rows, directory, scorer, say)
  try:
    derived.check(directory)
  except derived.DamagedError as error:
    raise ValueError(f'{array} of {rows.name}: {error}') from None
  kept = f'{passes} forward passes' if passes else 'known'
  say(f'reference  {array} of {rows.name}: {kept}, {directory}')
  return directory / _VALUES, Computed(rows.name, array, weights, passes)


def _directory(experiment, rows, source, weights: str) -> pathlib.Path:
  """Returns the place of a source's values, a hash of what they follow from."""
  data = experiment.data
  parts = {
    'format': _FORMAT,
    'weights': weights,
    'store': rows.store.digest,
    # Which tokens a row has beside each other does not matter; where a long
    # document is cut does.
    'rows': [data.packing, data.row_length],
    'numerics': [
      experiment.compute_dtype,
      experiment.execution.matmul,
      _base_form(experiment, source),
    ],
  }
  key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
  place = pathlib.Path(paths.expanded('data.data_dir', data.data_dir))
  return place / 'logprobs' / key


def _base_form(experiment, source: port.ModelSource) -> str:
  """Returns how the weights of a frozen model are stored, see `AdapterConfig`.

  A policy of adapters starts as its quantised base, and not as the weights that
  the base was made of: a reference of these would be another model.
  """
  adapter = experiment.adapter
  is_base = frozen_models.is_same(source.path, experiment.init_from)
  return adapter.base if adapter.rank and is_base else 'float'


def _compute(experiment, rows, directory, scorer, say) -> int:
  """Computes and writes the values of a source; returns the forward passes."""
  batches = batches_lib.EvalBatches(rows, experiment.data.batch_size)
  unfinished = directory.with_name(f'{directory.name}.rows')
  try:
    parts = _Parts(unfinished / str(batches.batch_size))
    # Every process takes part in every pass: all begin with the same batch.
    first = int(processes.gather(len(parts.done)).min())
    del parts.done[first:]
    told_at = time.monotonic()
    for batch in itertools.islice(batches, first, None):
      parts.add(scorer()(batch))
      if time.monotonic() - told_at >= 10:
        told_at = time.monotonic()
        say(
          f'reference  {rows.name}: {len(parts.done):,} of {len(batches):,}'
          ' forward passes'
        )

    def write(partial: pathlib.Path) -> None:
      values_N = np.asarray(rows.scattered(parts.done), np.float32)
      (partial / _VALUES).write_bytes(values_N.data)

    derived.open_or_write(directory, write)
    shutil.rmtree(unfinished, ignore_errors=True)
  except OSError as error:
    raise ValueError(
      f'{rows.name}: the log-probabilities of its reference cannot be written'
      f' to {directory.parent} ({error}); set data.data_dir to a writable'
      ' directory with enough room'
    ) from error
  return len(batches) - first


class _Parts:
  """The values of batches in order; written to disk now and then."""

  def __init__(self, directory: pathlib.Path):
    """Reads what is on disk, up to the first gap."""
    self._directory = directory
    atomic.make_directory(directory)
    self.done: list[np.ndarray] = []  # [B, T] each
    while (path := self._path(len(self.done))).exists():
      self.done += list(np.load(path))
    self._num_written = len(self.done)
    self._written_at = time.monotonic()

  def add(self, values_BT: np.ndarray) -> None:
    """Adds the next batch."""
    self.done.append(values_BT)
    if time.monotonic() - self._written_at < _SECONDS_BETWEEN_PARTS:
      return
    first = min(self._num_written, len(self.done) - 1)
    with io.BytesIO() as file:
      np.save(file, np.stack(self.done[first:]))
      atomic.write_bytes(self._path(first), file.getvalue())
    self._num_written = len(self.done)
    self._written_at = time.monotonic()

  def _path(self, first_batch: int) -> pathlib.Path:
    return self._directory / f'{first_batch:09d}.npy'


class _Scorer:
  """A frozen model on the devices of the run, without an optimizer."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    name: str,
    source: port.ModelSource,
    spare_ids: tuple[tuple[int, int], ...],
  ):
    """Reads, verifies and places the weights."""
    config = frozen_models.config_of(name, source, experiment.model.vocab_size)
    config = dataclasses.replace(config, spare_ids=spare_ids)
    devices = jax.devices()
    own = execution.settled(
      dataclasses.replace(experiment, model=config), devices
    )
    execution.check_model(own)
    model = transformer.Transformer(config, jnp.dtype(own.compute_dtype))
    stored_as = functools.partial(
      adapters.in_form,
      dataclasses.replace(
        experiment.adapter, base=_base_form(experiment, source)
      ),
    )
    abstract = _weights_alone(
      jax.eval_shape(stored_as, state_lib.abstract_params(model))
    )
    logical = state_lib.logical_axes(abstract, axes.param_axes(abstract.params))
    placement = placement_lib.make(own.parallel, abstract, logical, devices)
    params = frozen_models.place(
      stored_as(frozen_models.read(source, config)),
      placement.abstract_whole().params,
    )
    state = _weights_alone(params)
    self._params = placement.restored(state).params
    self._put_batch = placement.put_batch
    data = experiment.data
    self._shape = data.batch_size, data.row_length
    model = model.clone(execution=execution.choose(own, placement, 0))
    self._step = placement.compile_eval(
      lambda all_sum, _: model_port.make_score_step(
        model, num_places=data.batch_size * data.row_length, all_sum=all_sum
      )
    )

  def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns log p(target) of a batch, float32 [B, T]; 0 in padding."""
    places_BT = np.arange(self._shape[0] * self._shape[1], dtype=np.int32)
    arrays = {name: batch[name] for name in _READ}
    arrays['places'] = places_BT.reshape(self._shape)
    sums: Any = self._step(self._params, self._put_batch(arrays))
    logprobs_BT = np.asarray(sums['logprob']).reshape(self._shape)
    # Padding has an arbitrary target, which may be an id without a token.
    return np.where(batch['segment_ids'] > 0, logprobs_BT, 0.0)


def _weights_alone(params: Any) -> Any:
  """Returns a state without an optimizer and a key: nothing is trained."""
  step: Any = np.zeros((), np.int32)
  no_key: Any = None
  return state_lib.TrainState(
    step=step, params=params, opt_state=(), key=no_key
  )
