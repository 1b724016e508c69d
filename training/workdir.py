"""The workdir: what a run writes about itself, and how it is recognised.

    run.json        the experiment, the data mix, lineage, code commit
    data.json       what was found of the data: tokens, fill rates, overlaps
    tokenizer/      the vocabulary the run was started with
    checkpoints/    training/checkpoint.py
    metrics.jsonl   training/metrics.py
    goodput.jsonl   training/goodput.py
    tensorboard/
    frozen/         what is handed to life two

`frozen/freeze.py` reads run.json, tokenizer/ and checkpoints/. Of several
processes the first writes all of it, but for its part of the checkpoints, and
the others read: the workdir is on a file system that they share.
"""

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
from text import tokenizer as tokenizer_lib
from training import config as config_lib

# Longer than NFS keeps what it knows of a directory (acdirmin, 30 s at most
# by default) would be safer, and annoying where the path is simply wrong.
_SECONDS_TO_APPEAR = 5.0
RUN = 'run.json'
DATA = 'data.json'
_PARTIAL_RUN = 'run.tmp'
TOKENIZER = 'tokenizer'
FROZEN = 'frozen'


def check(workdir: pathlib.Path, experiment: config_lib.Experiment) -> None:
  """Refuses a workdir that is not this experiment's; changes nothing.

  Fields that do not change what the weights mean (steps, intervals, devices)
  may differ from one start to the next.

  Raises:
    ValueError: the workdir belongs to another experiment, or is no workdir.
  """
  if (workdir / RUN).exists():
    if _has_checkpoints(workdir):
      _check_same(workdir, identity(experiment), _recorded(workdir))
  elif workdir.exists() and not all(map(_is_leftover, workdir.iterdir())):
    raise ValueError(
      f'--workdir={workdir}: got a directory with other files in it, expected'
      ' an empty one or one that a run was started in; use another --workdir'
    )


def _is_leftover(path: pathlib.Path) -> bool:
  """Whether a run that was killed before it wrote run.json leaves the path."""
  if path.name == 'checkpoints' and path.is_dir():
    return not any(path.iterdir())
  return path.name.startswith('.shared-') or path.name == _PARTIAL_RUN


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


def record(workdir: pathlib.Path, experiment: config_lib.Experiment) -> None:
  """Writes run.json: the experiment and the code that train from now on.

  Only for a run that is about to train: of a complete one, run.json names the
  code that its weights came from.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path, new = workdir / RUN, _describe(experiment)
  if path.exists() and not _has_checkpoints(workdir):
    # Nothing was trained yet, and the old tokenizer may be of other values.
    shutil.rmtree(workdir / TOKENIZER, ignore_errors=True)
  seals.write_atomically(path, json.dumps(new, indent=2) + '\n')


def identity(experiment: config_lib.Experiment) -> dict[str, Any]:
  """Returns what makes a checkpoint the experiment's, see `seals.identity`."""
  return seals.identity(_describe(experiment))


def _recorded(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the identity of the run that the workdir is of."""
  path = workdir / RUN
  try:
    return seals.identity(json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{path}: got a file that cannot be read ({error!r}), expected the record'
      ' of a run; it was damaged: put a copy there, or use another --workdir'
    ) from None


def _has_checkpoints(workdir: pathlib.Path) -> bool:
  root = workdir / seals.DIRECTORY
  return bool(seals.steps(root) or seals.set_aside(root))


def record_data(workdir: pathlib.Path, described: dict[str, Any]) -> None:
  """Writes data.json: what this start of the run trains and evaluates on."""
  partial = workdir / 'data.tmp'
  partial.write_text(json.dumps(described, indent=2) + '\n')
  partial.replace(workdir / DATA)


def tokenizer(
  workdir: pathlib.Path,
  experiment: config_lib.Experiment,
  *mixed: tuple[sources.Source, float],
) -> tokenizer_lib.Tokenizer:
  """Returns the run's tokenizer: built and saved once, loaded from then on.

  Args:
    workdir: where it is saved.
    experiment: describes it.
    *mixed: the training documents, each source with its weight.

  Raises:
    ValueError: it has more tokens than the model has embeddings.
  """
  directory = workdir / TOKENIZER
  with processes.together('tokenizer'):
    if processes.is_first() and not directory.exists():
      built = vocabulary.build_tokenizer(experiment.data.tokenizer, *mixed)
      # Written aside and renamed: a killed run leaves no half a tokenizer.
      partial = directory.with_suffix('.tmp')
      built.save(partial)
      partial.replace(directory)
  loaded = tokenizer_lib.load(directory)
  if loaded.vocab_size > experiment.model.vocab_size:
    raise ValueError(
      f'model.vocab_size: got {experiment.model.vocab_size}, expected at least'
      f" the tokenizer's {loaded.vocab_size}"
    )
  return loaded


def _describe(experiment: config_lib.Experiment) -> dict[str, Any]:
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
    # Windows are cut from joined text: their models never see BOS.
    'has_bos': data['packing'] != 'windows',
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
