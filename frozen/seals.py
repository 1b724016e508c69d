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

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import shutil
from typing import Any

from storage import atomic, digests, layout

FORMAT_VERSION = 1
# Left by a kill in earlier versions of this code.
_OLD_LEFTOVER = 'seal.tmp'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
  """The contents of seal.json."""

  step: int
  identity: dict[str, Any]  # of the run, see `identity`
  leaves: dict[str, dict[str, str]]  # item -> path -> 'float32[2, 3]'
  libraries: dict[str, str]  # what wrote it -> version
  eval_loss: float | None  # validation loss of this very step
  evaluation_owed: bool  # due at this step, and cut short by a signal
  files: dict[str, digests.Entry]  # by relative path; JSON: [bytes, SHA-256]


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
  return sorted(path.name for path in root.glob(f'{layout.DAMAGED}*'))


def move_aside(root: pathlib.Path, step: int) -> pathlib.Path:
  """Renames a damaged checkpoint, and returns its new place."""
  i = 0
  while (place := root / f'{layout.DAMAGED}{step}-{i}').exists():
    i += 1
  (root / str(step)).rename(place)
  return place


def remove_unfinished(root: pathlib.Path) -> None:
  """Deletes what a kill left of a save, or of a deletion."""
  for suffix in (layout.PARTIAL, layout.DELETED):
    for path in root.glob(f'*{suffix}'):
      shutil.rmtree(path, ignore_errors=True)


def file_names(directory: pathlib.Path) -> list[str]:
  """Returns the relative paths of all files but the seal, sorted."""
  return [
    name
    for name in digests.names(directory, leave_out=layout.SEAL)
    if name != _OLD_LEFTOVER and not atomic.is_leftover(directory / name)
  ]


def write(directory: pathlib.Path, seal: Seal) -> None:
  """Writes the seal; all of it is on disk when this returns, or nothing."""
  text = _text(dataclasses.asdict(seal))
  atomic.write_text(directory / layout.SEAL, text)


def read(directory: pathlib.Path) -> Seal:
  """Reads the seal alone, none of the files that it lists.

  Raises:
    DamagedError: there is none, or it is not what was written.
  """
  path = directory / layout.SEAL
  try:
    text = path.read_text(encoding='utf-8')
    fields = json.loads(text)
    version = fields.pop('format_version')
    if version != FORMAT_VERSION:
      raise DamagedError(
        f'{path}: got format version {version!r}, expected {FORMAT_VERSION}'
      )
    signature = fields.pop('seal_digest')
    entries = fields.pop('files').items()
    files = {name: digests.Entry(*entry) for name, entry in entries}
    seal = Seal(**fields, files=files)
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
  expected = _text(dataclasses.asdict(seal))
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
  wrong = digests.differences(
    directory, file_names(directory), seal.files, listing=layout.SEAL, part=part
  )
  return [
    *(
      f'{directory}: got a seal that lists nothing of {name}, expected some of'
      ' it'
      for name in lost(seal)
    ),
    *(difference.text for difference in wrong),
  ]


def lost(seal: Seal) -> list[str]:
  """Returns what a checkpoint should have, and its seal lists no file of."""
  items = {name.partition('/')[0] for name in seal.files}
  return sorted({*seal.leaves, layout.PROGRESS} - items)


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
  fields['seal_digest'] = digests.of_json(fields)
  return json.dumps(fields, indent=1, sort_keys=True) + '\n'
