"""manifest.json: config, origin and digests of a frozen directory.

`frozen.format.write` writes the manifest. It is read before any other file of
the directory. It lists every other file with its SHA-256, and has a digest of
itself. So a changed weight is noticed, and also a changed field of the model,
such as the base of the rotary embedding.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any, Protocol, TypeVar

from storage import atomic, digests, file_names, public_paths

FORMAT_VERSION = 1
# Weights of a run that can be frozen. auto: the average if the run keeps one,
# else raw.
WEIGHTS = ('auto', 'raw', 'average')
# The kinds of other manifests, see frozen/adapters.py, frozen/draft_heads.py.
ADAPTER, DRAFT_HEAD = 'adapter', 'draft_head'
_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
  """The origin of weights; no field is inferred from a path."""

  experiment: str  # name
  code_commit: str  # '' if unknown
  step: int  # optimizer steps
  tokens_seen: int  # trained tokens
  training_flops: float  # total, analytic
  train_seconds: float  # wall clock of the training
  data_mix: list[dict[str, Any]]  # source, path, split, weight of each
  knowledge_cutoff: str  # newest known date of a text, or ''
  weights: str  # kind of the run's weights that are frozen: raw | average
  lineage: dict[str, str]  # role (init_from, teacher, ...) -> weights digest
  has_bos: bool  # whether training put BOS before each document
  # Imported weights, and weights trained from them: format, family, source,
  # revision of the import.
  origin: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Provenance):
  """The contents of manifest.json."""

  format_version: int
  model: dict[str, Any]  # every field of ModelConfig
  dtype: str  # of the weights and of the computation
  quantization: dict[str, Any]  # see frozen/stored_kernels.py
  num_params: int
  weights_digest: str  # see frozen.format.weights_digest
  files: dict[str, str]  # relative path -> SHA-256, all but the manifest
  manifest_digest: str  # SHA-256 over all the other fields
  # Heads beside the language model's, such as reward; a directory with a head
  # is no language model (`models.layers.reward_head`). Written only if a head
  # exists: older code then reads language models, and refuses other models.
  heads: list[str] = dataclasses.field(default_factory=list)

  @property
  def name(self) -> str:
    """Returns the name of the experiment or of the imported model."""
    # Earlier versions named an import by the path of its source.
    return public_paths.public(self.experiment.removeprefix('import '))

  def check_language_model(self, name: str, value: str) -> None:
    """Raises ValueError for a reward model, which predicts no tokens.

    Args:
      name: the field or flag that names the directory.
      value: its value.
    """
    if self.heads:
      raise ValueError(
        f'{name}: got {value}, a reward model, expected a language model: a'
        ' reward model gives a number per answer and predicts no tokens; score'
        ' answers with `python -m inference.rewards`'
      )


def sign(**fields: Any) -> Manifest:
  """Returns a manifest with its version and digest.

  Args:
    **fields: all other fields of `Manifest`.
  """
  fields['format_version'] = FORMAT_VERSION
  fields = _written(fields)
  return Manifest(**fields, manifest_digest=digests.of_json(fields))


def _written(fields: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in fields.items() if v or k != 'heads'}


def write(directory: pathlib.Path, manifest: Manifest) -> None:
  """Writes the manifest into `directory`."""
  text = json.dumps(_written(dataclasses.asdict(manifest)), indent=2)
  atomic.write_text(directory / file_names.MANIFEST, text + '\n')


def read_beside(
  path: pathlib.Path, make: type[_T], *, kind: str, version: int, name: str
) -> _T:
  """Reads and verifies the manifest of an addition to a model.

  Args:
    path: of the manifest, a file that exists.
    make: the dataclass of its fields.
    kind: ADAPTER or DRAFT_HEAD.
    version: of its format.
    name: of such an addition, with an article, for errors.

  Raises:
    ValueError: it is damaged, altered, or of another kind or version.
  """
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
    signed = {k: v for k, v in fields.items() if k != 'manifest_digest'}
    if fields.get('kind') != kind:
      raise ValueError(f'it is not of {name}')
    if fields.get('format_version') != version:
      raise ValueError(f'format version {fields.get("format_version")!r}')
    if digests.of_json(signed) != fields['manifest_digest']:
      raise ValueError('it was altered')
    return make(**fields)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{path}: got a manifest that cannot be used ({error}), expected one of'
      f' {name}, format {version}; copy or freeze it again'
    ) from None


def read(directory: pathlib.Path) -> Manifest:
  """Reads and verifies the manifest, and no other file.

  Raises:
    FileNotFoundError: there is no manifest.
    ValueError: it is damaged, altered, or of another format version.
  """
  path = directory / file_names.MANIFEST
  # A reader may lack the right to rename; then the directory is missing.
  with contextlib.suppress(OSError):
    atomic.restore(directory)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: got no such file, expected a frozen directory;'
      f' {_remedy(directory)}'
    )
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
      f'{path}: got a file that is not JSON ({error}), expected a manifest;'
      ' copy or freeze the directory again'
    ) from None
  if isinstance(fields, dict) and fields.get('kind') == ADAPTER:
    raise ValueError(
      f'{path}: got the directory of an adapter, expected a frozen one; give'
      ' its base, and the adapter beside it, or make one of both with `python'
      ' -m frozen.adapters merge`'
    )
  if isinstance(fields, dict) and fields.get('kind') == DRAFT_HEAD:
    raise ValueError(
      f'{path}: got the directory of a draft head, expected a frozen one; give'
      ' its model, and the head with --engine.draft_head'
    )
  version = fields.get('format_version') if isinstance(fields, dict) else None
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{path}: got format version {version!r}, expected {FORMAT_VERSION};'
      ' use the code that wrote it, or freeze again with this code'
    )
  known = {field.name: field for field in dataclasses.fields(Manifest)}
  unknown = sorted(fields.keys() - known)
  # A field with a default may be newer than the directory.
  missing = [
    name
    for name, field in known.items()
    if name not in fields
    and field.default_factory is dataclasses.MISSING
    and field.default is dataclasses.MISSING
  ]
  if unknown or missing:
    raise ValueError(
      f'{path}: got unknown fields {unknown} and missing fields {missing},'
      f' expected the fields of format {FORMAT_VERSION}; freeze again with this'
      ' code'
    )
  manifest = Manifest(**fields)
  signed = {k: v for k, v in fields.items() if k != 'manifest_digest'}
  if (digest := digests.of_json(signed)) != manifest.manifest_digest:
    raise ValueError(
      f'{path}: got contents with digest {digest}, expected'
      f' {manifest.manifest_digest}; it was altered, copy or freeze the'
      ' directory again'
    )
  return manifest


def _remedy(directory: pathlib.Path) -> str:
  """Returns the way to get a frozen directory from another kind of path."""
  if (directory / file_names.FROZEN / file_names.MANIFEST).is_file():
    return f'take {directory / file_names.FROZEN}, which the run has frozen'
  is_open = directory.suffix in ('.gguf', '.safetensors') or (
    directory.is_dir()
    and any(
      path.name == 'config.json' or path.suffix in ('.gguf', '.safetensors')
      for path in directory.iterdir()
    )
  )
  # The name of a repository on the hub is no path, and looks like ORG/MODEL.
  if is_open or not directory.exists():
    source = directory
    if directory.suffix == '.safetensors':
      source = directory.parent  # with its config.json
    remedy = (
      'import open weights with `python -m frozen.huggingface import'
      f' --source={source} --out=DIR`'
    )
    if is_open:
      return remedy
    return f'{remedy}, or make one with `python -m frozen.freeze`'
  return (
    'make one with `python -m frozen.freeze --workdir=RUN --out=DIR`, or from'
    ' open weights with `python -m frozen.huggingface import`'
  )


def file_digests(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of every file but the manifest, by relative path."""
  names = digests.names(directory, leave_out=file_names.MANIFEST)
  entries = digests.of_files(directory, names, num_threads=_num_threads())
  return {name: entry.sha256 for name, entry in entries.items()}


class Listing(Protocol):
  """The list of files in a manifest of any kind."""

  @property
  def files(self) -> dict[str, str]:
    """Relative path -> SHA-256."""
    ...


def check_files(directory: pathlib.Path, manifest: Listing) -> None:
  """Compares the files of a directory with the list in its manifest.

  Raises:
    FileNotFoundError: one is missing.
    ValueError: one is truncated, altered, or not listed.
  """
  wrong = digests.differences(
    directory,
    digests.names(directory, leave_out=file_names.MANIFEST),
    {n: digests.Entry(None, sha256) for n, sha256 in manifest.files.items()},
    listing=file_names.MANIFEST,
    num_threads=_num_threads(),
  )
  for text, kind in wrong:
    if kind == 'missing':
      raise FileNotFoundError(f'{text}; copy or freeze the directory again')
    if kind == 'unlisted':
      raise ValueError(f'{text}; move it elsewhere')
    raise ValueError(f'{text}; copy or freeze the directory again')


def _num_threads() -> int:
  return os.cpu_count() or 1
