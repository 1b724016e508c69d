"""The workdir: the directory of one run, and the check that it belongs to it.

`storage/file_names.py` lists the files in it. `frozen/freeze.py` reads
run.json, tokenizer/ and checkpoints/.

In a run of several processes the workdir is on a file system that they share.
The first process writes all of it, except that each process writes its part of
a checkpoint. The other processes read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import pathlib
import secrets
import shutil
import time
from typing import Any

import numpy as np

from frozen import recipe, run_record, seals
from parallel import processes
from storage import atomic, code_commit, file_names, locks
from training import experiment as experiment_lib

# NFS may show an old directory for up to 30 s (acdirmin, by default). Waiting
# that long would be safer, but slow where the path is simply wrong.
_SECONDS_TO_APPEAR = 5.0


def check(workdir: pathlib.Path, experiment: experiment_lib.Experiment) -> None:
  """Refuses the workdir of another experiment; changes nothing.

  Fields that do not change the meaning of the weights (steps, intervals,
  devices) may differ from one start to the next.

  Raises:
    ValueError: the workdir belongs to another experiment, or has other files.
  """
  if (workdir / file_names.RUN).exists():
    if _has_checkpoints(workdir):
      _check_same(workdir, identity(experiment), _recorded(workdir))
  elif workdir.exists() and not workdir.is_dir():
    raise ValueError(
      f'--workdir={workdir}: got a file, expected a directory or nothing; use'
      ' another --workdir'
    )
  elif workdir.exists() and not all(map(_is_leftover, workdir.iterdir())):
    raise ValueError(
      f'--workdir={workdir}: got a directory with other files in it, expected'
      ' an empty one or one that a run was started in; use another --workdir'
    )


def _is_leftover(path: pathlib.Path) -> bool:
  """Returns whether a run that was killed before run.json leaves this path."""
  if path.name == file_names.CHECKPOINTS and path.is_dir():
    return not any(path.iterdir())
  if path.name == file_names.TOKENIZER:
    # A tokenizer without a lock file was not made by a run.
    return (path.parent / file_names.LOCK).exists()
  return (
    path.name == file_names.LOCK
    or path.name.startswith('.shared-')
    or atomic.is_leftover(path)
  )


@contextlib.contextmanager
def held(
  workdir: pathlib.Path, tell: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
  """Holds the lock of a workdir, so that no other run writes there.

  A new workdir is created. A run that ends before it writes run.json leaves
  nothing behind.

  Args:
    tell: receives a warning if the file system has no locks.

  Raises:
    locks.InUseError: another run holds the lock.
    OSError: the workdir cannot be created.
  """
  is_new = not workdir.exists()
  with locks.held(workdir / file_names.LOCK, f'--workdir={workdir}', tell):
    try:
      atomic.remove_leftovers(workdir)
      yield
    finally:
      if not (workdir / file_names.RUN).exists():
        _clear(workdir, is_new=is_new)


def _clear(workdir: pathlib.Path, *, is_new: bool) -> None:
  """Removes the files of a run that did not write run.json."""
  shutil.rmtree(workdir / file_names.TOKENIZER, ignore_errors=True)
  with contextlib.suppress(OSError):
    atomic.remove_leftovers(workdir)
    (workdir / file_names.LOCK).unlink(missing_ok=True)
    if is_new:
      workdir.rmdir()


def check_shared(workdir: pathlib.Path) -> None:
  """Refuses a workdir that the processes of a run do not share.

  The first process writes a file, and the others look for it.

  Raises:
    ValueError: a process does not see the file.
  """
  if processes.count() == 1:
    return
  drawn = int(processes.gather(secrets.randbelow(2**31))[0, 0])
  probe = workdir / f'.shared-{drawn:08x}'
  try:
    with processes.together('workdir'):
      if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
    lost = np.flatnonzero(processes.gather(not _appears(probe))[:, 0])
  finally:
    if processes.is_first():
      probe.unlink(missing_ok=True)
  if lost.size:
    raise ValueError(
      f'--workdir={workdir}: got a directory of its own in process'
      f' {", ".join(map(str, lost))}, expected one that all'
      f' {processes.count()} processes share; put it on a shared file system'
    )


def _appears(path: pathlib.Path) -> bool:
  """Returns whether the path appears within `_SECONDS_TO_APPEAR`."""
  give_up = time.monotonic() + _SECONDS_TO_APPEAR
  while not path.exists():
    if time.monotonic() > give_up:
      return False
    time.sleep(0.05)
  return True


def prepare(workdir: pathlib.Path) -> None:
  """Removes the tokenizer of a workdir without checkpoints.

  An earlier start may have built it from other values of the experiment.
  """
  if not _has_checkpoints(workdir):
    shutil.rmtree(workdir / file_names.TOKENIZER, ignore_errors=True)


def record(
  workdir: pathlib.Path,
  experiment: experiment_lib.Experiment,
  phases: Sequence[Mapping[str, Any]] = (),
  start: Mapping[str, Any] | None = None,
) -> None:
  """Writes run.json: the experiment and the code that train from now on.

  Called only when the run is about to take steps. So the run.json of a complete
  run names the code that its weights came from.

  Args:
    phases: weights of the data sources over time, see
      `TrainBatches.get_state`.
    start: the weights that the run starts from, see `init_from.describe`. None:
      the run is resumed, and keeps its recorded start.
  """
  new = _describe(experiment)
  new |= _recorded_start(workdir) if start is None else start
  if len(phases) > 1:
    for i, source in enumerate(new['data_mix']):
      source['phases'] = [
        {'from_row': phase['from_row'], 'weight': phase['weights'][i]}
        for phase in phases
      ]
  atomic.write_text(workdir / file_names.RUN, json.dumps(new, indent=2) + '\n')


def config_before(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns the experiment of a run with checkpoints as recorded, or None."""
  if not _has_checkpoints(workdir):
    return None
  try:
    config = run_record.read(workdir)['config']
    return config if isinstance(config, dict) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None  # `check` reports it


def changes(
  workdir: pathlib.Path, experiment: experiment_lib.Experiment
) -> list[str]:
  """Returns the fields that changed since the last start, each as a text."""
  try:
    before = _flat(run_record.read(workdir)['config'])
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, AttributeError):
    return [f'{workdir / file_names.RUN} cannot be read']
  now = _flat(experiment.to_dict())
  return [
    f'{name}: got {_short(now.get(name))}, before {_short(before.get(name))}'
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
  ]


def _flat(values: Any, prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested values by path, spelled as in a flag."""
  if isinstance(values, dict):
    items = [(f'{prefix}.{k}' if prefix else k, v) for k, v in values.items()]
  elif isinstance(values, list) and any(isinstance(v, dict) for v in values):
    items = [(f'{prefix}[{i}]', v) for i, v in enumerate(values)]
  else:
    return {prefix: values}
  return {k: v for name, value in items for k, v in _flat(value, name).items()}


def _short(value: Any) -> str:
  return 'nothing' if value is None else repr(value)


def identity(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  """Returns the identity of an experiment, see `seals.identity`."""
  return seals.identity(_describe(experiment))


def _recorded(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the identity of the run in the workdir."""
  run = run_record.read(workdir)
  try:
    return seals.identity(run)
  except (KeyError, TypeError, AttributeError) as error:
    raise run_record.damaged(workdir, error) from None


def _has_checkpoints(workdir: pathlib.Path) -> bool:
  root = workdir / file_names.CHECKPOINTS
  return bool(seals.steps(root) or seals.set_aside(root))


def recorded_lineage(workdir: pathlib.Path) -> dict[str, str]:
  """Returns the digests that the run began with, by role."""
  return _recorded_start(workdir)['lineage']


def recorded_template(workdir: pathlib.Path) -> str | None:
  """Returns the chat template that the run began with; None: no such run."""
  return _recorded_start(workdir)['base'].get('chat_template')


def _recorded_start(workdir: pathlib.Path) -> dict[str, Any]:
  try:
    run = run_record.read(workdir)
    return {'lineage': run['lineage'], 'base': run.get('base', {})}
  except (OSError, ValueError, KeyError, TypeError):
    return {'lineage': {}, 'base': {}}


def record_data(workdir: pathlib.Path, described: dict[str, Any]) -> None:
  """Writes data.json: the data that this start trains and evaluates on."""
  text = json.dumps(described, indent=2) + '\n'
  atomic.write_text(workdir / file_names.DATA, text)


def evaluated_before(workdir: pathlib.Path) -> str:
  """Returns the digest of the evaluation tokens of the last start, or ''."""
  try:
    text = (workdir / file_names.DATA).read_text(encoding='utf-8')
    return json.loads(text)['evaluation']['digest']
  except (OSError, ValueError, KeyError, TypeError):
    return ''


def _describe(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  config = experiment.to_dict()
  data = config['data']
  return {
    'format_version': run_record.FORMAT_VERSION,
    'experiment': experiment.name,
    'model': config['model'],
    'data_mix': [
      {
        'source': f'{open_source.__module__}.{open_source.__qualname__}',
        'path': source.path,
        'split': source.split,
        'weight': source.weight,
      }
      for source in experiment.data.train_sources()
      for open_source in [source.open_source]
    ],
    'knowledge_cutoff': data['knowledge_cutoff'],
    'lineage': {},
    'base': {},
    'has_bos': experiment.data.has_bos,
    'code_commit': code_commit.find(),
    'made_with': recipe.made_with(),
    'config': config,
  }


def _check_same(
  workdir: pathlib.Path, new: dict[str, Any], old: dict[str, Any]
) -> None:
  """Raises ValueError if two identities differ."""
  if words := seals.difference(new, old):
    raise ValueError(
      f'--workdir={workdir} holds another run: {words}; use another --workdir,'
      ' or the value it was started with'
    )
