"""Checkpoints damaged on purpose: each must be found, named and passed over."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import pathlib
import random
import shutil

import numpy as np

from frozen import freeze, seals
from storage import file_names
from tests.survival import process
from training import experiment
from training.checkpoints import checkpoint

Damage = Callable[[pathlib.Path, random.Random], pathlib.Path]


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in directory.rglob('*') if path.is_file())


def _any_file(directory: pathlib.Path, rng: random.Random) -> pathlib.Path:
  """Draws by size half of the time: most bytes are in few files."""
  files = [path for path in _files(directory) if path.stat().st_size]
  weights = None
  if rng.random() < 0.5:
    weights = [path.stat().st_size for path in files]
  return rng.choices(files, weights)[0]


def flip(directory: pathlib.Path, rng: random.Random) -> pathlib.Path:
  """Flips one bit of one file, the seal and orbax's own among them."""
  path = _any_file(directory, rng)
  data = bytearray(path.read_bytes())
  bit = rng.randrange(8 * len(data))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)
  return path


def truncate(directory: pathlib.Path, rng: random.Random) -> pathlib.Path:
  """Cuts one file short, perhaps to nothing."""
  path = _any_file(directory, rng)
  with path.open('r+b') as file:
    file.truncate(rng.randrange(path.stat().st_size))
  return path


def half_delete(directory: pathlib.Path, rng: random.Random) -> pathlib.Path:
  """Deletes some of the files, as a deletion that was cut short."""
  files = _files(directory)
  gone = rng.sample(files, rng.randrange(1, len(files)))
  for path in gone:
    path.unlink()
  # A missing seal is all that can be said of one.
  seal = directory / file_names.SEAL
  return seal if seal in gone else sorted(gone)[0]


def add(directory: pathlib.Path, rng: random.Random) -> pathlib.Path:
  """Adds a file that nobody sealed."""
  path = _any_file(directory, rng).parent / f'{rng.randrange(2**32):08x}'
  path.write_bytes(rng.randbytes(10))
  return path


KINDS: dict[str, Damage] = {
  'bit flips': flip,
  'truncations': truncate,
  'half deletions': half_delete,
  'added files': add,
}


def tree_digest(directory: pathlib.Path) -> str:
  """Returns a digest of all names and contents below."""
  digest = hashlib.sha256()
  for path in sorted(directory.rglob('*')):
    digest.update(f'{path.relative_to(directory)}\0'.encode())
    if path.is_file():
      digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


@contextlib.contextmanager
def _copy(workdir: pathlib.Path, place: pathlib.Path) -> Iterator[pathlib.Path]:
  shutil.copytree(workdir, place)
  try:
    yield place
  finally:
    shutil.rmtree(place)


def recover(
  workdir: pathlib.Path, tell: Callable[[str], None] = lambda text: None
) -> checkpoint.Resume:
  """Opens the checkpoints of a workdir, as a run that resumes does."""
  run = json.loads((workdir / 'run.json').read_text())
  saved = checkpoint.Checkpoints(
    workdir, experiment.CheckpointConfig(), seals.identity(run)
  )
  return saved.open(tell)


def try_damage(
  workdir: pathlib.Path, damage: Damage, rng: random.Random
) -> list[str]:
  """Damages the newest of several checkpoints of a copy; returns what is wrong.

  It has to be named with the file, moved aside, refused by `frozen.freeze`, and
  the one before used, to the bit.
  """
  root = workdir / file_names.CHECKPOINTS
  *_, before, newest = seals.steps(root)
  with _copy(workdir, workdir.with_name(f'{workdir.name}-damaged')) as copy:
    path = damage(copy / file_names.CHECKPOINTS / str(newest), rng)
    wrong = []
    with contextlib.suppress(seals.DamagedError):
      freeze.freeze_checkpoint(copy, step=newest, out=copy / 'again')
      wrong.append(f'{path} was frozen')
    told: list[str] = []
    resume = recover(copy, told.append)
    if resume.step != before:
      wrong.append(f'{path}: went on from {resume.step}')
    if not any(str(path) in text for text in told):
      wrong.append(f'{path} was not named: {told}')
    if not any((copy / file_names.CHECKPOINTS).glob(f'damaged-{newest}-*')):
      wrong.append(f'{path}: nothing was moved aside')
    got, wanted = process.arrays(copy, before), process.arrays(workdir, before)
    if any(not np.array_equal(got[name], wanted[name]) for name in wanted):
      wrong.append(f'{path}: the one before is another')
    return wrong


def try_all_damaged(workdir: pathlib.Path, rng: random.Random) -> list[str]:
  """Damages every checkpoint: refused, and nothing changed."""
  with _copy(workdir, workdir.with_name(f'{workdir.name}-damaged')) as copy:
    for step in seals.steps(copy / file_names.CHECKPOINTS):
      rng.choice(list(KINDS.values()))(
        copy / file_names.CHECKPOINTS / str(step), rng
      )
    before = tree_digest(copy)
    try:
      recover(copy)
    except ValueError as error:
      if 'no checkpoint that is whole' not in str(error):
        return [str(error)]
    else:
      return ['went on although all of them were damaged']
    return [] if tree_digest(copy) == before else ['something was changed']
