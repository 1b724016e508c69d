"""The seal of a checkpoint: what makes it one, and shows that it is whole.

    WORKDIR/checkpoints/STEP/seal.json     this file's
    WORKDIR/checkpoints/STEP/...           what it lists, with sizes and SHA-256
    WORKDIR/checkpoints/STEP.partial/      being written; nothing until renamed
    WORKDIR/checkpoints/STEP.deleted/      being deleted
    WORKDIR/checkpoints/damaged-STEP-N/    found damaged, moved aside

Training seals a directory when all of it is on disk, and only then renames it
to the number of its step: a checkpoint exists once it is sealed. Whoever reads
one verifies it first (`problems`), so that a file that was truncated, altered
in one bit, added or lost is named instead of trained on. The seal says whose
checkpoint it is, too, and signs itself.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

FORMAT_VERSION = 1
FILE_NAME = 'seal.json'
PROGRESS = 'progress.json'  # step, PRNG key, data, cost
_PARTIAL_FILE = 'seal.tmp'
DIRECTORY = 'checkpoints'
PARTIAL = '.partial'
DELETED = '.deleted'
_DAMAGED = 'damaged-'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
  """The contents of seal.json."""

  step: int
  identity: dict[str, Any]  # of the run, see `identity`
  leaves: dict[str, dict[str, str]]  # item -> path -> 'float32[2, 3]'
  libraries: dict[str, str]  # what wrote it -> version
  eval_loss: float | None  # validation loss of this very step
  evaluation_owed: bool  # due at this step, and cut short by a signal
  files: dict[str, list[Any]]  # relative path -> [bytes, SHA-256]


class DamagedError(ValueError):
  """A checkpoint that is not what was written."""


def identity(run: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what decides the meaning of the weights, from a run.json."""
  config = run.get('config', {})
  flat = {'experiment': run['experiment'], 'seed': config.get('seed')}
  for prefix, fields in (
    ('model', run['model']),
    ('data.tokenizer', config.get('data', {}).get('tokenizer', {})),
  ):
    flat |= {f'{prefix}.{name}': value for name, value in fields.items()}
  return json.loads(json.dumps(flat))  # lists for tuples, as when read back


def difference(got: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
  """Returns the first field that differs, in words; empty if none does."""
  for name in sorted(got.keys() | expected.keys()):
    if got.get(name) != expected.get(name):
      return f'got {name} = {got.get(name)!r}, expected {expected.get(name)!r}'
  return ''


def steps(root: pathlib.Path) -> list[int]:
  """Returns the steps that have a checkpoint, ascending; damaged ones, too."""
  return sorted(int(p.name) for p in root.glob('*') if p.name.isdecimal())


def set_aside(root: pathlib.Path) -> list[str]:
  """Returns the names of checkpoints that were found damaged before."""
  return sorted(path.name for path in root.glob(f'{_DAMAGED}*'))


def move_aside(root: pathlib.Path, step: int) -> pathlib.Path:
  """Renames a damaged checkpoint, and returns its new place."""
  i = 0
  while (place := root / f'{_DAMAGED}{step}-{i}').exists():
    i += 1
  (root / str(step)).rename(place)
  return place


def remove_unfinished(root: pathlib.Path) -> None:
  """Deletes what a kill left of a save, or of a deletion."""
  for suffix in (PARTIAL, DELETED):
    for path in root.glob(f'*{suffix}'):
      shutil.rmtree(path, ignore_errors=True)


def file_names(directory: pathlib.Path) -> list[str]:
  """Returns the relative paths of all files but the seal, sorted."""
  return sorted(
    name
    for path in directory.rglob('*')
    if path.is_file()
    and (name := path.relative_to(directory).as_posix())
    not in (FILE_NAME, _PARTIAL_FILE)  # the latter is left by a kill
  )


def digest(
  directory: pathlib.Path, names: Sequence[str], *, sync: bool = False
) -> dict[str, list[Any]]:
  """Returns size and SHA-256 of files, read in chunks.

  Args:
    directory: that the names are relative to.
    names: which files.
    sync: also wait until the disk has them.
  """
  found = {}
  for name in names:
    with (directory / name).open('rb') as file:
      if sync:
        os.fsync(file.fileno())
      sha = hashlib.file_digest(file, 'sha256').hexdigest()
      found[name] = [file.tell(), sha]
  return found


def write(directory: pathlib.Path, seal: Seal) -> None:
  """Writes the seal; all of it is on disk when this returns, or nothing."""
  for path in (directory, *directory.rglob('*')):
    if path.is_dir():
      sync_directory(path)
  write_atomically(directory / FILE_NAME, _text(dataclasses.asdict(seal)))


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file that is there whole or not at all, whatever happens."""
  partial = path.with_name(f'{path.stem}.tmp')
  try:
    with partial.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  sync_directory(path.parent)


def sync_directory(directory: pathlib.Path) -> None:
  """Waits until the disk has the names in a directory."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def read(directory: pathlib.Path) -> Seal:
  """Reads the seal alone, none of the files that it lists.

  Raises:
    DamagedError: there is none, or it is not what was written.
  """
  path = directory / FILE_NAME
  try:
    text = path.read_text(encoding='utf-8')
    fields = json.loads(text)
    version = fields.pop('format_version')
    if version != FORMAT_VERSION:
      raise DamagedError(
        f'{path}: got format version {version!r}, expected {FORMAT_VERSION}'
      )
    signature = fields.pop('seal_digest')
    seal = Seal(**fields)
  except (FileNotFoundError, NotADirectoryError):
    raise DamagedError(
      f'{path}: got no such file, expected a seal: the checkpoint was never'
      ' finished, or was half deleted'
    ) from None
  except DamagedError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DamagedError(
      f'{path}: got a file that cannot be read ({error!r}), expected a seal'
    ) from None
  # As text: JSON can say one thing in several ways, and a flip may do so.
  expected = _text(fields)
  if text != expected:
    raise DamagedError(
      f'{path}: got contents that do not match their digest {signature!r},'
      ' expected those that were written'
    )
  return seal


def problems(
  directory: pathlib.Path, seal: Seal, *, part: tuple[int, int] = (0, 1)
) -> list[str]:
  """Compares the files of a checkpoint with its seal; empty if all is well.

  Args:
    directory: of the checkpoint.
    seal: as `read`.
    part: (i, n): read every n-th file from the i-th on, one of n processes.
  """
  found = set(file_names(directory))
  wrong = [
    f'{directory / name}: got no such file, expected {seal.files[name][0]}'
    f' bytes with SHA-256 {seal.files[name][1]}'
    for name in sorted(seal.files.keys() - found)
  ]
  wrong += [
    f'{directory}: got a seal that lists nothing of {name}, expected some of it'
    for name in lost(seal)
  ]
  wrong += [
    f'{directory / name}: got a file that the seal does not list, expected none'
    for name in sorted(found - seal.files.keys())
  ]
  i, n = part
  for name in sorted(found & seal.files.keys())[i::n]:
    try:
      got = digest(directory, [name])[name]
    except OSError as error:
      wrong.append(f'{directory / name}: got {error}, expected to read it')
      continue
    expected = seal.files[name]
    if got != expected:
      wrong.append(
        f'{directory / name}: got {got[0]} bytes with SHA-256 {got[1]},'
        f' expected {expected[0]} with {expected[1]}'
      )
  return wrong


def lost(seal: Seal) -> list[str]:
  """Returns what a checkpoint should have, and its seal lists no file of."""
  items = {name.partition('/')[0] for name in seal.files}
  return sorted({*seal.leaves, PROGRESS} - items)


def check(directory: pathlib.Path, run: Mapping[str, Any]) -> Seal:
  """Verifies a checkpoint that is about to be read, and whose it is.

  Args:
    directory: of the checkpoint.
    run: the contents of run.json beside it.

  Raises:
    DamagedError: it is not what was written.
    ValueError: it is of another run.
  """
  try:
    seal = read(directory)
    if wrong := problems(directory, seal):
      raise DamagedError('; '.join(wrong))
  except DamagedError as error:
    raise DamagedError(
      f'{error}; put a good copy there, or choose another step'
    ) from None
  check_owner(directory, seal, identity(run))
  return seal


def check_owner(
  directory: pathlib.Path, seal: Seal, expected: Mapping[str, Any]
) -> None:
  """Refuses a checkpoint that was copied from elsewhere.

  Raises:
    ValueError: names what differs.
  """
  if str(seal.step) != directory.name:
    raise ValueError(
      f'{directory}: got a checkpoint of step {seal.step}, expected that of'
      f' step {directory.name}; give the directory its name back'
    )
  if words := difference(seal.identity, expected):
    raise ValueError(
      f'{directory}: got a checkpoint of another run: {words}; move it out of'
      ' there'
    )


def _text(fields: Mapping[str, Any]) -> str:
  """Returns the text of a seal, the only one for its fields."""
  fields = {'format_version': FORMAT_VERSION, **fields}
  text = json.dumps(fields, sort_keys=True)
  signature = hashlib.sha256(text.encode()).hexdigest()
  fields['seal_digest'] = signature
  return json.dumps(fields, indent=1, sort_keys=True) + '\n'
