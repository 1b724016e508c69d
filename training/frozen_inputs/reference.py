"""Outputs of frozen models for the data of a run, computed once.

An objective names them in `logprobs_needed` and `top_tokens_needed`. Before the
first step, each frozen model computes log p(target) of every token of the
training and the evaluation rows, or its likeliest next tokens. The results are
arrays of each batch from then on: no step and no epoch computes them again.
They are kept in the data directory:

    logprobs/<key>/           a derived directory (storage/derived.py)
      logprobs.bin            float32, one value per id of the token store
    logprobs/<key>.rows/      the parts of an unfinished computation
    top_tokens/<key>/         the same, of the k likeliest tokens
      ids.bin                 int32, k per id of the token store
      logprobs.bin            float32, k + 1 per id: of these, and of the rest

The key is a hash of the weights, the tokens, their layout in rows and the
numerics; so another run with the same data and model reads them too. A run that
is stopped in between goes on where it was.
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
from training.frozen_inputs import frozen_models, top_tokens
from training.objectives import port

Say = Callable[[str], None]
_FORMAT = 1
_READ = 'tokens', 'targets', 'positions', 'segment_ids'
# Seconds between two parts on disk: a kill loses at most this much work.
_SECONDS_BETWEEN_PARTS = 60.0


class Computed(NamedTuple):
  """The values of one frozen model for one source of rows."""

  source: str
  array: str  # name in batches; for top tokens, the start of their names
  weights: str  # digest of the frozen model's weights
  forward_passes: int  # in this start of the run; 0: all values were on disk


class _Wanted(NamedTuple):
  """Values that an objective needs of a frozen model."""

  name: str
  source: port.ModelSource
  top: port.TopTokens | None  # None: log p(target)

  @property
  def folder(self) -> str:
    """Returns the folder of the data directory that keeps such values."""
    return 'top_tokens' if self.top else 'logprobs'

  @property
  def files(self) -> dict[str, str]:
    """Returns the file of each array, by the array's name in batches."""
    if self.top is None:
      return {self.name: 'logprobs.bin'}
    return {
      f'{self.name}_ids': 'ids.bin',
      f'{self.name}_logprobs': 'logprobs.bin',
    }

  @property
  def specs(self) -> dict[str, port.ArraySpec]:
    """Returns shape and dtype of each array, by its name in batches."""
    if self.top is None:
      return {self.name: port.ArraySpec('BT', jnp.float32)}
    return self.top.specs(self.name)

  def columns(self, directory: pathlib.Path) -> dict[str, rows_lib.Column]:
    """Returns the arrays as columns of the token store, by name."""
    return {
      name: rows_lib.Column(
        directory / self.files[name], np.dtype(spec.dtype).name, spec.width
      )
      for name, spec in self.specs.items()
    }


def _wanted(experiment: experiment_lib.Experiment) -> list[_Wanted]:
  objective, init_from = experiment.objective, experiment.init_from
  return [
    _Wanted(name, frozen_models.resolved(source, init_from), None)
    for name, source in objective.logprobs_needed.items()
  ] + [
    _Wanted(name, frozen_models.resolved(top.source, init_from), top)
    for name, top in objective.top_tokens_needed.items()
  ]


def add_values(
  experiment: experiment_lib.Experiment,
  sources_of_rows: Sequence[rows_lib.Rows],
  spare_ids: tuple[tuple[int, int], ...],
  say: Say = lambda _: None,
) -> tuple[list[rows_lib.Rows], tuple[Computed, ...]]:
  """Returns the rows with the arrays of frozen models that the objective needs.

  A collective: all processes compute them together.

  Args:
    experiment: validated.
    sources_of_rows: rows of the training sources, and of the evaluation split.
    spare_ids: ids of the model without a token, see `Learner.masking`.
    say: receives a line about each source.

  Raises:
    ValueError: the reference cannot be read, the rows have no fixed layout, or
      the data directory cannot be written.
  """
  found, computed = list(sources_of_rows), []
  for wanted in _wanted(experiment):
    # Made at its first use: known values need no weights.
    scorer = functools.cache(
      functools.partial(_Scorer, experiment, wanted, spare_ids)
    )
    for i, rows in enumerate(found):
      directory, done = _of_source(experiment, rows, wanted, scorer, say)
      for name, column in wanted.columns(directory).items():
        rows = rows.with_array(name, column)
      found[i] = rows
      computed.append(done)
  return found, tuple(computed)


def _of_source(
  experiment, rows, wanted: _Wanted, scorer, say
) -> tuple[pathlib.Path, Computed]:
  """Returns the directory with the values of all ids of a source's store."""
  if rows.is_random:
    raise ValueError(
      'data.packing: got windows, whose rows start at random tokens, with the'
      f' objective {type(experiment.objective).__name__}, expected another'
      ' packing: the log-probabilities of a reference are computed once, of'
      ' tokens with a fixed context'
    )
  weights = frozen_models.digest_of(wanted.name, wanted.source)
  directory = _directory(experiment, rows, wanted, weights)
  passes = 0
  # Agreed, because each process may have its own data directory, and only some
  # directories may be complete.
  if processes.agree(not directory.is_dir()):
    passes = _compute(experiment, rows, wanted, directory, scorer, say)
  try:
    derived.check(directory)
  except derived.DamagedError as error:
    raise ValueError(f'{wanted.name} of {rows.name}: {error}') from None
  kept = f'{passes} forward passes' if passes else 'known'
  say(f'reference  {wanted.name} of {rows.name}: {kept}, {directory}')
  return directory, Computed(rows.name, wanted.name, weights, passes)


def _directory(experiment, rows, wanted: _Wanted, weights: str) -> pathlib.Path:
  """Returns the directory of a source's values, named by their inputs' hash."""
  data = experiment.data
  parts = {
    'format': _FORMAT,
    'weights': weights,
    'store': rows.store.digest,
    # The neighbours of a document in its row do not matter; the place where a
    # long document is cut does.
    'rows': [data.packing, data.row_length],
    'numerics': [
      experiment.compute_dtype,
      experiment.execution.matmul,
      _base_form(experiment, wanted.source),
    ],
  }
  if wanted.top is not None:
    parts['top'] = [wanted.top.count, wanted.top.temperature]
  key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
  place = pathlib.Path(paths.expanded('data.data_dir', data.data_dir))
  return place / wanted.folder / key


def _base_form(experiment, source: port.ModelSource) -> str:
  """Returns the form of a frozen model's weights, see `AdapterConfig`.

  A policy of adapters starts as its quantised base. The weights before
  quantisation would be another model, and a wrong reference.
  """
  adapter = experiment.adapter
  is_base = frozen_models.is_same(source.path, experiment.init_from)
  return adapter.base if adapter.rank and is_base else 'float'


def _compute(experiment, rows, wanted: _Wanted, directory, scorer, say) -> int:
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
      for name, file in wanted.files.items():
        values = rows.scattered([arrays[name] for arrays in parts.done])
        dtype = np.dtype(wanted.specs[name].dtype)
        (partial / file).write_bytes(values.astype(dtype).data)

    derived.open_or_write(directory, write)
    shutil.rmtree(unfinished, ignore_errors=True)
  except OSError as error:
    raise ValueError(
      f'{rows.name}: the values of {wanted.name} cannot be written'
      f' to {directory.parent} ({error}); set data.data_dir to a writable'
      ' directory with enough room'
    ) from error
  return len(batches) - first


class _Parts:
  """The values of batches in order; written to disk now and then."""

  def __init__(self, directory: pathlib.Path):
    """Reads the parts that are on disk, up to the first gap."""
    self._directory = directory
    atomic.make_directory(directory)
    self.done: list[dict[str, np.ndarray]] = []  # [B, T, ...] by name
    while (path := self._path(len(self.done))).exists():
      with np.load(path) as found:
        names = found.files
        rows = zip(*(list(found[name]) for name in names), strict=True)
        self.done += [dict(zip(names, row, strict=True)) for row in rows]
    self._num_written = len(self.done)
    self._written_at = time.monotonic()

  def add(self, arrays: dict[str, np.ndarray]) -> None:
    """Adds the next batch."""
    self.done.append(arrays)
    if time.monotonic() - self._written_at < _SECONDS_BETWEEN_PARTS:
      return
    first = min(self._num_written, len(self.done) - 1)
    with io.BytesIO() as file:
      kept = {
        name: np.stack([part[name] for part in self.done[first:]])
        for name in arrays
      }
      np.savez(file, **kept)  # pyright: ignore[reportArgumentType]
      atomic.write_bytes(self._path(first), file.getvalue())
    self._num_written = len(self.done)
    self._written_at = time.monotonic()

  def _path(self, first_batch: int) -> pathlib.Path:
    return self._directory / f'{first_batch:09d}.npz'


class _Scorer:
  """A frozen model on the devices of the run, without an optimizer."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    wanted: _Wanted,
    spare_ids: tuple[tuple[int, int], ...],
  ):
    """Reads, verifies and places the weights.

    Raises:
      ValueError: the weights cannot be read, or there are fewer tokens than are
        wanted.
    """
    source = wanted.source
    config = frozen_models.config_of(
      wanted.name, source, experiment.model.vocab_size
    )
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
    num_places = data.batch_size * data.row_length
    self._wanted, top = wanted, wanted.top

    def build(all_sum, _):
      if top is None:
        return model_port.make_score_step(
          model, num_places=num_places, all_sum=all_sum
        )
      return top_tokens.make_step(
        model, top, num_places=num_places, all_sum=all_sum
      )

    self._step = placement.compile_eval(build)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the values of a batch, [B, T, ...] by name; 0 in padding."""
    places_BT = np.arange(self._shape[0] * self._shape[1], dtype=np.int32)
    arrays = {name: batch[name] for name in _READ}
    arrays['places'] = places_BT.reshape(self._shape)
    sums: Any = self._step(self._params, self._put_batch(arrays))
    if self._wanted.top is None:
      sums = {self._wanted.name: sums['logprob']}
    else:
      sums = {f'{self._wanted.name}_{part}': x for part, x in sums.items()}
    found = {}
    for name, spec in self._wanted.specs.items():
      values = np.array(sums[name], np.dtype(spec.dtype))
      values = values.reshape(*self._shape, *values.shape[1:])
      # Padding has an arbitrary target, which may be an id without a token.
      values[batch['segment_ids'] == 0] = 0
      found[name] = values
    return found


def _weights_alone(params: Any) -> Any:
  """Returns a state with weights only: nothing is trained."""
  step: Any = np.zeros((), np.int32)
  no_key: Any = None
  return state_lib.TrainState(
    step=step, params=params, opt_state=(), key=no_key
  )
