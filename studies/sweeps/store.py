"""The storage of a sweep: an Optuna study with one row for each trial.

Optuna proposes points, decides which trials to prune, and keeps the results in
SQLite or in a server's database. Two rules are added here.

Points that depend on no result (grid, random, qmc) are all enqueued when the
sweep begins. So neither a kill nor the number of processes changes them: a
sampler that starts again would otherwise propose its first points once more.

An errored trial that runs again is a new trial in Optuna, because Optuna never
reopens a trial. Both belong to one point, whose number names its files and its
row in the table. The last trial of a point counts.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import pathlib
from typing import Any
import warnings

from storage import digests
from training import experiment as experiment_lib, sweep as sweep_lib

POINT, SEEDS, NOTE, RESTART = 'point', 'seeds', 'note', 'restart'
_IDENTITY, _WORKDIR = 'identity', 'workdir'
# Fields that may change between starts, because no trial depends on them.
_FREE = ('num_trials', 'trials_at_once')
# Seconds that a process waits for another one to finish a write into SQLite.
_BUSY_S = 120


def optuna() -> Any:
  """Returns the library.

  Raises:
    ValueError: Optuna is not installed.
  """
  try:
    import optuna as found
  except ModuleNotFoundError:
    raise ValueError(
      'sweep: got no optuna, expected it to be installed; run pip install -r'
      ' requirements-sweep.txt'
    ) from None
  found.logging.set_verbosity(found.logging.ERROR)
  return found


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
  """Silences Optuna's warnings about experimental parts; tests see changes."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', optuna().exceptions.ExperimentalWarning)
    yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A point, with the trial that counts."""

  point: int
  number: int  # Optuna's
  state: str  # waiting | running | complete | pruned | errored
  params: dict[str, sweep_lib.Scalar]
  value: float | None  # mean over seeds; infinite if one of them diverged
  seeds: dict[str, float]  # value by seed
  intermediate: dict[int, float]  # mean by number of evaluations
  note: str  # an error, or how the trial ended
  trial_id: int
  is_restart: bool = False  # of an errored trial, from its start


_STATES = {
  'WAITING': 'waiting',
  'RUNNING': 'running',
  'COMPLETE': 'complete',
  'PRUNED': 'pruned',
  'FAIL': 'errored',
}
FINISHED = ('complete', 'pruned', 'errored')


def redacted(url: str) -> str:
  """Returns the address of a database without its password."""
  from sqlalchemy import engine, exc

  try:
    return engine.make_url(url).render_as_string(hide_password=True)
  except exc.ArgumentError:
    return url.partition('@')[2] or url


class Store:
  """The study of one sweep."""

  def __init__(
    self,
    sweep: sweep_lib.Sweep,
    experiment: experiment_lib.Experiment,
    *,
    url: str,
    workdir_token: str,
    num_evaluations: int,
  ):
    """Opens the study, or creates it.

    Args:
      url: address of the database, as SQLAlchemy takes it.
      workdir_token: identifies the directory with the trials' files.
      num_evaluations: number of evaluations of a trial, for pruners.

    Raises:
      ValueError: the database cannot be opened, or has another sweep of this
        name.
    """
    self.sweep = sweep
    self.place = redacted(url)
    self._num_evaluations = num_evaluations
    library = optuna()
    from sqlalchemy import exc

    options = {'timeout': _BUSY_S} if url.startswith('sqlite') else {}
    try:
      storage = library.storages.RDBStorage(
        url, engine_kwargs={'connect_args': options}
      )
      with without_warnings():
        self.study = library.create_study(
          storage=storage,
          study_name=sweep.name,
          direction=sweep.direction,
          sampler=self._sampler(sweep.sampler_seed),
          pruner=self._pruner(),
          load_if_exists=True,
        )
    # Optuna wraps errors of the database; a missing driver is an ImportError.
    except (
      exc.SQLAlchemyError,
      library.exceptions.OptunaError,
      ImportError,
      RuntimeError,
    ) as error:
      reason = str(error.__cause__ or error).partition('\n')[0]
      _refuse_missing_driver(self.place, error)
      raise ValueError(
        f'--storage: got {self.place}, which cannot be opened'
        f' ({type(error).__name__}: {reason.replace(url, self.place)}),'
        ' expected the'
        ' address of a database, as sqlite:///sweep.db'
      ) from None
    self._check(experiment, workdir_token)

  def _check(self, experiment, workdir_token: str) -> None:
    """Refuses the study of another sweep; records a new one."""
    config = experiment.to_dict()
    sweep = {k: v for k, v in self.sweep.to_dict().items() if k not in _FREE}
    identity = {'sweep': sweep, 'config': config}
    attrs = self.study.user_attrs
    if _IDENTITY not in attrs:
      self.study.set_user_attr(_WORKDIR, workdir_token)
      self.study.set_user_attr(_IDENTITY, json.dumps(identity))
      return
    before = json.loads(attrs[_IDENTITY])
    if digests.of_json(before) != digests.of_json(identity):
      raise ValueError(
        f'--storage={self.place}: got the sweep {self.sweep.name!r} with'
        f' {"; ".join(_differences(before, identity))}; expected the same sweep'
        ' and config; use another --workdir (and --storage), or rename the'
        ' sweep'
      )
    if attrs[_WORKDIR] != workdir_token:
      raise ValueError(
        f'--storage={self.place}: got the sweep {self.sweep.name!r} of another'
        ' --workdir, expected that directory, which all processes share: it'
        ' has the checkpoints; mount it, or rename the sweep'
      )

  def _sampler(self, seed: int):
    samplers = optuna().samplers
    with without_warnings():
      if self.sweep.strategy == 'tpe':
        # Running trials count as poor ones, so that the next point is not close
        # to them.
        return samplers.TPESampler(seed=seed, constant_liar=True)
      if self.sweep.strategy == 'qmc':
        return samplers.QMCSampler(
          seed=seed, scramble=True, warn_independent_sampling=False
        )
      return samplers.RandomSampler(seed=seed)

  def _pruner(self):
    pruners = optuna().pruners
    kind, reduction = self.sweep.pruner, self.sweep.reduction
    with without_warnings():
      if kind == 'median':
        return pruners.MedianPruner(n_startup_trials=4)
      if kind == 'asha':
        return pruners.SuccessiveHalvingPruner(
          min_resource=1, reduction_factor=reduction
        )
      if kind == 'hyperband':
        return pruners.HyperbandPruner(
          min_resource=1,
          max_resource=self._num_evaluations,
          reduction_factor=reduction,
        )
      return pruners.NopPruner()

  # --------------------------------------------------------------------------
  # Called by one process at a time: `claims.py` holds a lock.

  def enqueue(self) -> None:
    """Adds the points that are known before any result."""
    if self.sweep.strategy == 'tpe':
      return
    known = self._num_points()
    points = self._points() if known < self.sweep.count() else []
    for params in points[known:]:
      self.study.enqueue_trial(params)

  def _points(self) -> list[dict[str, sweep_lib.Scalar]]:
    if self.sweep.strategy == 'grid':
      return self.sweep.grid()
    with without_warnings():
      drawing = optuna().create_study(
        sampler=self._sampler(self.sweep.sampler_seed)
      )
      return [
        self._suggest(self._asked(drawing)) for _ in range(self.sweep.count())
      ]

  def _asked(self, drawing):
    trial = drawing.ask()
    if self.sweep.strategy == 'qmc':
      # The space of the sampler follows from the earlier trials. Without it,
      # the first trial would be an independent draw.
      trial.relative_search_space = self.distributions()
      trial._relative_params = drawing.sampler.sample_relative(
        drawing, trial._cached_frozen_trial, trial.relative_search_space
      )
    return trial

  def distributions(self) -> dict[str, Any]:
    """Returns the spaces in Optuna's types."""
    found = optuna().distributions
    made = {}
    for name, space in self.sweep.parameters.items():
      if isinstance(space, sweep_lib.Choice):
        made[name] = found.CategoricalDistribution(space.values)
      elif isinstance(space, sweep_lib.Integer):
        made[name] = found.IntDistribution(
          space.low, space.high, step=space.step
        )
      else:
        made[name] = found.FloatDistribution(
          space.low, space.high, log=isinstance(space, sweep_lib.LogUniform)
        )
    return made

  def _suggest(self, trial) -> dict[str, sweep_lib.Scalar]:
    """Returns the point of a trial; values that are already set stay."""
    values = {}
    with without_warnings():
      for name, space in self.sweep.parameters.items():
        if isinstance(space, sweep_lib.Choice):
          value = trial.suggest_categorical(name, space.values)
        elif isinstance(space, sweep_lib.Integer):
          value = trial.suggest_int(
            name, space.low, space.high, step=space.step
          )
        else:
          is_log = isinstance(space, sweep_lib.LogUniform)
          value = trial.suggest_float(name, space.low, space.high, log=is_log)
        values[name] = value
    return values

  def ask(self) -> Any | None:
    """Returns a new trial; None if there are as many as the sweep has."""
    waiting = self.study.get_trials(
      deepcopy=False, states=(optuna().trial.TrialState.WAITING,)
    )
    if not waiting and self._num_points() >= self.sweep.count():
      return None
    trial = self.study.ask()
    self._complete(trial)
    return trial

  def again(self, row: Row) -> Any:
    """Returns the trial of a row whose process has ended."""
    with without_warnings():
      trial = optuna().trial.Trial(self.study, row.trial_id)
    # The process may have been killed before the trial had all its values.
    self._complete(trial)
    return trial

  def _complete(self, trial) -> None:
    # A draw depends on the number of the trial alone, and on the results so
    # far: a process that starts again does not repeat the draws of the last.
    self.study.sampler = self._sampler(self.sweep.sampler_seed + trial.number)
    self._suggest(trial)

  def retry(self, row: Row, *, restart: bool) -> None:
    """Enqueues an errored trial again.

    Args:
      restart: whether it runs from its start, not from its checkpoint.
    """
    self.study.enqueue_trial(
      row.params, user_attrs={POINT: row.point, RESTART: restart}
    )

  def _num_points(self) -> int:
    trials = self.study.get_trials(deepcopy=False)
    return sum(POINT not in trial.user_attrs for trial in trials)

  # --------------------------------------------------------------------------

  def report(self, trial, evaluation: int, value: float) -> bool:
    """Records the mean at an evaluation; returns whether to prune the trial."""
    frozen = self.study.get_trials(deepcopy=False)[trial.number]
    if evaluation not in frozen.intermediate_values:
      trial.report(value, evaluation)
    with without_warnings():
      return trial.should_prune()

  def finish(
    self,
    trial,
    *,
    state: str,
    value: float | None = None,
    seeds: dict[int, float] | None = None,
    note: str = '',
  ) -> None:
    """Records the end of a trial.

    Args:
      state: one of `FINISHED`.
      value: mean over seeds, for a complete trial.
      seeds: value by seed.
      note: an error, or how the trial ended.
    """
    states = optuna().trial.TrialState
    of = {'complete': states.COMPLETE, 'pruned': states.PRUNED}
    trial.set_user_attr(
      SEEDS, {str(seed): value for seed, value in (seeds or {}).items()}
    )
    trial.set_user_attr(NOTE, note)
    self.study.tell(
      trial.number,
      value if state == 'complete' else None,
      state=of.get(state, states.FAIL),
    )

  def rows(self) -> list[Row]:
    """Returns the trial that counts of each point, by point."""
    found: dict[int, Row] = {}
    for trial in self.study.get_trials(deepcopy=False):
      row = _row(trial)
      # In the order of their numbers, so the last trial of a point stays.
      found[row.point] = row
    return [found[point] for point in sorted(found)]


# Packages of the modules that SQLAlchemy imports for an address.
_DRIVERS = {
  'psycopg': '"psycopg[binary]"',
  'psycopg2': 'psycopg2-binary',
  'MySQLdb': 'mysqlclient',
}


def _refuse_missing_driver(place: str, error: BaseException) -> None:
  """Raises ValueError if a database has no driver here."""
  cause: BaseException | None = error
  while cause is not None and not isinstance(cause, ModuleNotFoundError):
    cause = cause.__cause__ or cause.__context__
  if cause is not None and cause.name:
    raise ValueError(
      f'--storage: got {place}, whose driver {cause.name} is missing, expected'
      ' it to be installed on every host; run pip install'
      f' {_DRIVERS.get(cause.name, cause.name)}'
    ) from None


def _row(trial) -> Row:
  attrs = trial.user_attrs
  fixed = trial.system_attrs.get('fixed_params', {})
  return Row(
    point=attrs.get(POINT, trial.number),
    number=trial.number,
    state=_STATES[trial.state.name],
    params={**fixed, **trial.params},
    value=trial.value if trial.values else None,
    seeds=attrs.get(SEEDS, {}),
    intermediate=dict(trial.intermediate_values),
    note=attrs.get(NOTE, ''),
    trial_id=trial._trial_id,
    is_restart=attrs.get(RESTART, False),
  )


def worst(direction: str) -> float:
  """Returns the value of a trial that diverged."""
  return math.inf if direction == 'minimize' else -math.inf


def _differences(before: Any, now: Any, prefix: str = '') -> list[str]:
  """Returns the first few differing leaves, each as `NAME = A, not B`."""
  if isinstance(before, dict) and isinstance(now, dict):
    found = []
    for key in sorted(before.keys() | now.keys()):
      path = f'{prefix}.{key}' if prefix else key
      found += _differences(before.get(key), now.get(key), path)
    return found[:3]
  same = json.dumps(before) == json.dumps(now)
  return [] if same else [f'{prefix} = {before!r}, not {now!r}']


def default_url(workdir: pathlib.Path) -> str:
  """Returns the address of the SQLite file in a workdir."""
  return f'sqlite:///{workdir / "sweep.db"}'
