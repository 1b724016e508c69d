"""The seal of a checkpoint: a signed list of its files and their digests.

    WORKDIR/checkpoints/STEP/seal.json     the seal
    WORKDIR/checkpoints/STEP/...           the files that it lists
    WORKDIR/checkpoints/STEP.partial/      being written; not a checkpoint yet
    WORKDIR/checkpoints/STEP.deleted/      being deleted
    WORKDIR/checkpoints/damaged-STEP-N/    found damaged, and set aside

Training seals a directory when all of its files are on disk. Then it renames
the directory to the number of its step. So every checkpoint has a seal.

A reader verifies the checkpoint first (`problems`). A file that was truncated,
altered in one bit, added or lost is named, and nothing is trained on it. The
seal also says which run the checkpoint belongs to, and has a digest of itself.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import shutil
from typing import Any

from models import model_config
from storage import atomic, digests, file_names as file_names_lib

FORMAT_VERSION = 1
# Files of earlier versions of this code, left there by a kill.
_OLD_LEFTOVER = 'seal.tmp'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
  """The contents of seal.json."""

  step: int
  identity: dict[str, Any]  # of the run, see `identity`
  leaves: dict[str, dict[str, str]]  # item -> path -> 'float32[2, 3]'
  libraries: dict[str, str]  # name -> version, of the writer
  eval_loss: float | None  # validation loss of this step
  evaluation_owed: bool  # the evaluation of this step was cut short by a signal
  files: dict[str, digests.Entry]  # by relative path; JSON: [bytes, SHA-256]


class DamagedError(ValueError):
  """A checkpoint that differs from the checkpoint that was written."""


class VersionError(ValueError):
  """A checkpoint of another version of the format."""


def identity(run: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a run.json that decide the meaning of its weights.

  They are the name, the seed, the model, the tokenizer and the adapters. A run
  may resume only from a checkpoint with the same identity.
  """
  config = run.get('config', {})
  flat = {'experiment': run['experiment'], 'seed': config.get('seed')}
  for prefix, fields in (
    ('model', run['model']),
    ('data.tokenizer', config.get('data', {}).get('tokenizer', {})),
  ):
    flat |= {f'{prefix}.{name}': value for name, value in fields.items()}
  if config.get('adapter', {}).get('rank'):  # runs without one have no fields
    flat |= {f'adapter.{k}': value for k, value in config['adapter'].items()}
  # These fields follow from the tokenizer. Checkpoints of earlier versions lack
  # them.
  flat.pop('model.spare_ids', None)
  return json.loads(json.dumps(flat))  # lists for tuples, as when read back


def difference(got: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
  """Returns the first field that differs, in words; '' if none does.

  A field of the model that one side lacks has its default there: the run was
  recorded before the field existed.
  """
  model = json.loads(json.dumps(model_config.ModelConfig.defaults()))
  defaults = {f'model.{name}': value for name, value in model.items()}
  for name in sorted(got.keys() | expected.keys()):
    default = defaults.get(name)
    a, b = got.get(name, default), expected.get(name, default)
    if (
      isinstance(default, dict) and isinstance(a, dict) and isinstance(b, dict)
    ):
      a, b = {**default, **a}, {**default, **b}
    if a != b:
      return f'got {name} = {a!r}, expected {b!r}'
  return ''


def steps(root: pathlib.Path) -> list[int]:
  """Returns the steps that have a checkpoint, ascending; not verified."""
  return sorted(int(p.name) for p in root.glob('*') if p.name.isdecimal())


def set_aside(root: pathlib.Path) -> list[str]:
  """Returns the names of checkpoints that were found damaged earlier."""
  return sorted(path.name for path in root.glob(f'{file_names_lib.DAMAGED}*'))


def move_aside(root: pathlib.Path, step: int) -> pathlib.Path:
  """Renames a damaged checkpoint; returns its new path."""
  i = 0
  while (place := root / f'{file_names_lib.DAMAGED}{step}-{i}').exists():
    i += 1
  (root / str(step)).rename(place)
  return place


def restore_replaced(root: pathlib.Path) -> None:
  """Puts back checkpoints that a killed process was about to replace."""
  if root.is_dir():
    atomic.remove_leftovers(root)


def remove_unfinished(root: pathlib.Path) -> None:
  """Deletes the leftovers of saves and deletions by killed processes."""
  for suffix in (file_names_lib.PARTIAL, file_names_lib.DELETED):
    for path in root.glob(f'*{suffix}'):
      shutil.rmtree(path, ignore_errors=True)


def file_names(directory: pathlib.Path) -> list[str]:
  """Returns the relative paths of all files but the seal, sorted."""
  return [
    name
    for name in digests.names(directory, leave_out=file_names_lib.SEAL)
    if name != _OLD_LEFTOVER and not atomic.is_leftover(directory / name)
  ]


def write(directory: pathlib.Path, seal: Seal) -> None:
  """Writes the seal atomically, see `storage.atomic`."""
  text = _text(dataclasses.asdict(seal))
  atomic.write_text(directory / file_names_lib.SEAL, text)


def read(directory: pathlib.Path) -> Seal:
  """Returns the seal of a checkpoint; reads none of the files that it lists.

  Raises:
    DamagedError: there is no seal, or it is damaged.
    VersionError: the seal is whole, and of another version of the format.
  """
  path = directory / file_names_lib.SEAL
  try:
    text = path.read_text(encoding='utf-8')
    fields = json.loads(text)
    signature = fields.pop('seal_digest')
    # The digest matches, so the version is a true one and not a damaged bit.
    is_whole = digests.of_json(fields) == signature
    version = fields.pop('format_version')
    if is_whole and version != FORMAT_VERSION:
      raise VersionError(
        f'{path}: got format version {version!r}, expected {FORMAT_VERSION};'
        ' use the code that wrote the checkpoint'
      )
    entries = fields.pop('files').items()
    files = {name: digests.Entry(*entry) for name, entry in entries}
    seal = Seal(**fields, files=files)
  except (FileNotFoundError, NotADirectoryError):
    raise DamagedError(
      f'{path}: got no such file, expected a seal: the checkpoint was never'
      ' finished, or was half deleted'
    ) from None
  except VersionError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DamagedError(
      f'{path}: got a file that cannot be read ({error!r}), expected a seal'
    ) from None
  # Compared as text: the same JSON values have several texts, and a damaged
  # bit may turn one into another.
  expected = _text(dataclasses.asdict(seal))
  if text != expected:
    raise DamagedError(
      f'{path}: got contents that do not match their digest {signature!r},'
      ' expected the contents that were written'
    )
  return seal


def problems(
  directory: pathlib.Path, seal: Seal, *, part: tuple[int, int] = (0, 1)
) -> list[str]:
  """Returns a text for each difference of a checkpoint's files from its seal.

  Args:
    part: (i, n): read every n-th file from the i-th on. The n processes of a
      run share the reading in this way.
  """
  wrong = digests.differences(
    directory,
    file_names(directory),
    seal.files,
    listing=file_names_lib.SEAL,
    part=part,
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
  """Returns the parts of a checkpoint of which the seal lists no file."""
  items = {name.partition('/')[0] for name in seal.files}
  return sorted({*seal.leaves, file_names_lib.PROGRESS} - items)


def check(directory: pathlib.Path, run: Mapping[str, Any]) -> Seal:
  """Verifies a checkpoint before it is read.

  Raises:
    DamagedError: it is damaged.
    ValueError: it belongs to another run, or has another version.
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
  """Refuses a checkpoint of another run or another step.

  Raises:
    ValueError: names the field that differs.
  """
  if str(seal.step) != directory.name:
    raise ValueError(
      f'{directory}: got a checkpoint of step {seal.step}, expected one of'
      f' step {directory.name}; rename the directory'
    )
  if words := difference(seal.identity, expected):
    raise ValueError(
      f'{directory}: got a checkpoint of another run: {words}; move it to'
      ' another directory'
    )


def _text(fields: Mapping[str, Any]) -> str:
  """Returns the text of a seal; the same fields always give the same text."""
  fields = {'format_version': FORMAT_VERSION, **fields}
  fields['seal_digest'] = digests.of_json(fields)
  return json.dumps(fields, indent=1, sort_keys=True) + '\n'
