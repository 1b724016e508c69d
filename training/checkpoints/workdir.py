"""The workdir: what a run writes about itself, and how it is recognised.

    run.json        the experiment, the data mix, lineage, code commit
    data.json       what was found of the data: tokens, fill rates, overlaps
    tokenizer/      the vocabulary the run was started with
    checkpoints/    training/checkpoints/checkpoint.py
    metrics.jsonl   training/reporting/metrics.py
    goodput.jsonl   training/reporting/goodput.py
    tensorboard/
    frozen/         what is handed to life two
    .lock           held while a run writes here, see `held`

`frozen/freeze.py` reads run.json, tokenizer/ and checkpoints/. Of several
processes the first writes all of it, but for its part of the checkpoints, and
the others read: the workdir is on a file system that they share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import pathlib
import secrets
import shutil
import subprocess
import time
from typing import Any

import numpy as np

from data import sources, vocabulary
from frozen import seals
from parallel import processes
from storage import atomic, layout, locks
from text import tokenizer as tokenizer_lib
from training import experiment as experiment_lib

# Longer than NFS keeps what it knows of a directory (acdirmin, 30 s at most
# by default) would be safer, and annoying where the path is simply wrong.
_SECONDS_TO_APPEAR = 5.0


def check(workdir: pathlib.Path, experiment: experiment_lib.Experiment) -> None:
  """Refuses a workdir that is not this experiment's; changes nothing.

  Fields that do not change what the weights mean (steps, intervals, devices)
  may differ from one start to the next.

  Raises:
    ValueError: the workdir belongs to another experiment, or is no workdir.
  """
  if (workdir / layout.RUN).exists():
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
  """Whether a run that was killed before it wrote run.json leaves the path."""
  if path.name == layout.CHECKPOINTS and path.is_dir():
    return not any(path.iterdir())
  if path.name == layout.TOKENIZER:
    # Or anybody's.
    return (path.parent / layout.LOCK).exists()
  return (
    path.name == layout.LOCK
    or path.name.startswith('.shared-')
    or atomic.is_leftover(path)
  )


@contextlib.contextmanager
def held(
  workdir: pathlib.Path, tell: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
  """Makes a workdir if there is none, and keeps other runs out of it.

  A run that ends before it is recorded leaves nothing behind.

  Args:
    workdir: whose.
    tell: is told where the file system has no locks.

  Raises:
    locks.InUseError: another run holds it.
    OSError: it cannot be made.
  """
  is_new = not workdir.exists()
  with locks.held(workdir / layout.LOCK, f'--workdir={workdir}', tell):
    try:
      atomic.remove_leftovers(workdir)
      yield
    finally:
      if not (workdir / layout.RUN).exists():
        _clear(workdir, is_new=is_new)


def _clear(workdir: pathlib.Path, *, is_new: bool) -> None:
  """Removes what a run has made that was never recorded."""
  shutil.rmtree(workdir / layout.TOKENIZER, ignore_errors=True)
  with contextlib.suppress(OSError):
    atomic.remove_leftovers(workdir)
    (workdir / layout.LOCK).unlink(missing_ok=True)
    if is_new:
      workdir.rmdir()


def check_shared(workdir: pathlib.Path) -> None:
  """Refuses a workdir that the processes of a run do not share.

  The first one writes a file, and the others look for it.

  Raises:
    ValueError: a process does not see it.
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
  """Returns whether the path exists soon: network file systems are slow."""
  give_up = time.monotonic() + _SECONDS_TO_APPEAR
  while not path.exists():
    if time.monotonic() > give_up:
      return False
    time.sleep(0.05)
  return True


def prepare(workdir: pathlib.Path) -> None:
  """Removes a tokenizer that nothing was trained with.

  The run that made it may have been started with other values.
  """
  if not _has_checkpoints(workdir):
    shutil.rmtree(workdir / layout.TOKENIZER, ignore_errors=True)


def record(
  workdir: pathlib.Path,
  experiment: experiment_lib.Experiment,
  phases: Sequence[Mapping[str, Any]] = (),
  lineage: Mapping[str, str] | None = None,
) -> None:
  """Writes run.json: the experiment and the code that train from now on.

  Only for a run that is about to train, and can: of a complete one, run.json
  names the code that its weights came from.

  Args:
    workdir: where.
    experiment: what is trained.
    phases: of the weights of its sources, as in `TrainBatches.get_state`.
    lineage: digests of the weights that it starts from; None: of a run that
      goes on, those that are recorded.
  """
  new = _describe(experiment)
  if lineage is None:
    lineage = recorded_lineage(workdir)
  new['lineage'] = dict(lineage)
  if len(phases) > 1:
    for i, source in enumerate(new['data_mix']):
      source['phases'] = [
        {'from_row': phase['from_row'], 'weight': phase['weights'][i]}
        for phase in phases
      ]
  atomic.write_text(workdir / layout.RUN, json.dumps(new, indent=2) + '\n')


def changes(
  workdir: pathlib.Path, experiment: experiment_lib.Experiment
) -> list[str]:
  """Returns what the experiment has otherwise than the run before, in words."""
  try:
    text = (workdir / layout.RUN).read_text(encoding='utf-8')
    before = _flat(json.loads(text)['config'])
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, AttributeError):
    return [f'{workdir / layout.RUN} cannot be read']
  now = _flat(experiment.to_dict())
  return [
    f'{name}: got {_short(now.get(name))}, before {_short(before.get(name))}'
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
  ]


def _flat(values: Any, prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested values by their path, as in a flag."""
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
  """Returns what makes a checkpoint the experiment's, see `seals.identity`."""
  return seals.identity(_describe(experiment))


def _recorded(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the identity of the run that the workdir is of."""
  path = workdir / layout.RUN
  try:
    return seals.identity(json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{path}: got a file that cannot be read ({error!r}), expected the record'
      ' of a run; it was damaged: put a copy there, or use another --workdir'
    ) from None


def _has_checkpoints(workdir: pathlib.Path) -> bool:
  root = workdir / layout.CHECKPOINTS
  return bool(seals.steps(root) or seals.set_aside(root))


def recorded_lineage(workdir: pathlib.Path) -> dict[str, str]:
  """Returns the digests that the run began with, by role."""
  try:
    return json.loads((workdir / layout.RUN).read_text(encoding='utf-8'))[
      'lineage'
    ]
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def record_data(workdir: pathlib.Path, described: dict[str, Any]) -> None:
  """Writes data.json: what this start of the run trains and evaluates on."""
  text = json.dumps(described, indent=2) + '\n'
  atomic.write_text(workdir / layout.DATA, text)


def evaluated_before(workdir: pathlib.Path) -> str:
  """Returns the digest of the tokens evaluated on before; '' if unknown."""
  try:
    text = (workdir / layout.DATA).read_text(encoding='utf-8')
    return json.loads(text)['evaluation']['digest']
  except (OSError, ValueError, KeyError, TypeError):
    return ''


def tokenizer(
  workdir: pathlib.Path,
  experiment: experiment_lib.Experiment,
  *mixed: tuple[sources.Source, float],
) -> tokenizer_lib.Tokenizer:
  """Returns the run's tokenizer: built and saved once, loaded from then on.

  Args:
    workdir: where it is saved.
    experiment: describes it.
    *mixed: the training documents, each source with its weight.

  Raises:
    ValueError: it has more tokens than the model has embeddings, or is damaged.
  """
  directory = workdir / layout.TOKENIZER
  with processes.together('tokenizer'):
    if processes.is_first() and not directory.exists():
      built = vocabulary.build_tokenizer(experiment.data.tokenizer, *mixed)
      with atomic.new_directory(directory) as partial:
        built.save(partial)
  try:
    loaded = tokenizer_lib.load(directory)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{directory}: got a tokenizer that cannot be read ({error}), expected'
      f' the one that the run was started with; put a copy there, as the one in'
      f' {layout.FROZEN}/ is, or use another --workdir'
    ) from None
  if loaded.vocab_size > experiment.model.vocab_size:
    raise ValueError(
      f'model.vocab_size: got {experiment.model.vocab_size}, expected at least'
      f" the tokenizer's {loaded.vocab_size}"
    )
  return loaded


def _describe(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  config = experiment.to_dict()
  data = config['data']
  return {
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
    'has_bos': experiment.data.has_bos,
    'code_commit': _code_commit(),
    'config': config,
  }


def _check_same(
  workdir: pathlib.Path, new: dict[str, Any], old: dict[str, Any]
) -> None:
  """Compares what decides the meaning of the weights."""
  if words := seals.difference(new, old):
    raise ValueError(
      f'--workdir={workdir} holds another run: {words}; use another --workdir,'
      ' or the value it was started with'
    )


def _code_commit() -> str:
  """Returns the commit that runs, '-dirty' appended if it was edited."""
  try:
    result = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=40'],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return result.stdout.strip()
