"""Draft head directories: the head of `models/layers/draft_head.py`, frozen.

    manifest.json             the digest of the model's weights, the head's own
    draft_head.safetensors    its matrices, float32
    recipe.json               how the run made it: frozen/recipe.py

A head belongs to the weights whose states it was trained on: the frozen
directory with the digest in its manifest. With other weights its guesses would
be noise, so `read` refuses them.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import safetensors_files
from models.layers import draft_head
from storage import atomic, digests, file_names

FORMAT_VERSION = 1
FILE = 'draft_head.safetensors'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftHeadManifest(manifest_lib.Provenance):
  """The contents of a draft head's manifest.json."""

  kind: str  # manifest_lib.DRAFT_HEAD
  format_version: int
  base_digest: str  # digest of the model's weights
  model_width: int  # D
  inner_width: int  # F
  num_ids: int  # K, the ids that it guesses: the first ones
  num_params: int
  head_digest: str  # over the digest of the model and the head's values
  files: dict[str, str]  # relative path -> SHA-256, all but the manifest
  manifest_digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftHead:
  """The contents of a draft head directory, verified."""

  directory: pathlib.Path
  manifest: DraftHeadManifest
  head: Any  # for models.layers.draft_head; float32, on the host


def write(
  directory: str | os.PathLike,
  head: Any,
  *,
  base_digest: str,
  num_ids: int,
  provenance: manifest_lib.Provenance,
  texts: Mapping[str, str],
  overwrite: bool = False,
) -> DraftHeadManifest:
  """Writes a draft head directory; a failure leaves `directory` unchanged.

  Args:
    directory: to write.
    head: as `models.layers.draft_head.init` makes it.
    base_digest: of the weights that it was trained on.
    num_ids: K, the ids that it guesses.
    provenance: origin of the head.
    texts: contents of other files by name.
    overwrite: replace another head.

  Raises:
    ValueError: `directory` has other contents.
  """
  target = pathlib.Path(directory).absolute()
  atomic.restore(target)
  is_ours = overwrite and (target / file_names.MANIFEST).is_file()
  if target.exists() and not is_ours and any(target.iterdir()):
    raise ValueError(
      f'{target}: got a place that holds something else, expected a new'
      ' directory or, with overwrite, one that was frozen; choose another place'
    )
  tensors = {
    name: np.asarray(matrix['kernel'], np.float32)
    for name, matrix in sorted(head.items())
  }
  with atomic.new_directory(target) as partial:
    safetensors_files.write_file(partial / FILE, tensors, np.dtype(np.float32))
    for name, text in texts.items():
      (partial / name).write_bytes(text.encode('utf-8'))
    model_width, inner_width = tensors['up'].shape[0] // 2, len(tensors['down'])
    fields = {
      **dataclasses.asdict(provenance),
      'kind': manifest_lib.DRAFT_HEAD,
      'format_version': FORMAT_VERSION,
      'base_digest': base_digest,
      'model_width': model_width,
      'inner_width': inner_width,
      'num_ids': num_ids,
      'num_params': sum(x.size for x in tensors.values()),
      'head_digest': _digest(base_digest, tensors),
      'files': manifest_lib.file_digests(partial),
    }
    manifest = DraftHeadManifest(
      **fields, manifest_digest=digests.of_json(fields)
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    atomic.write_text(partial / file_names.MANIFEST, text + '\n')
  return manifest


def read_manifest(directory: str | os.PathLike) -> DraftHeadManifest:
  """Reads and verifies the manifest of a draft head, and no other file.

  Raises:
    FileNotFoundError: there is no manifest.
    ValueError: it is damaged, or not a draft head's.
  """
  path = pathlib.Path(directory) / file_names.MANIFEST
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: got no such file, expected the directory of a draft head; train'
      ' one with experiments/draft_head.py'
    )
  return manifest_lib.read_beside(
    path,
    DraftHeadManifest,
    kind=manifest_lib.DRAFT_HEAD,
    version=FORMAT_VERSION,
    name='a draft head',
  )


def read(
  directory: str | os.PathLike, base: manifest_lib.Manifest
) -> DraftHead:
  """Reads a draft head directory and verifies every digest.

  Args:
    directory: written by `write`.
    base: manifest of the model that it is to draft for.

  Raises:
    FileNotFoundError: there is no draft head, or a file is missing.
    ValueError: a file is damaged, or the head belongs to other weights.
  """
  directory = pathlib.Path(directory).absolute()
  manifest = read_manifest(directory)
  if manifest.base_digest != base.weights_digest:
    raise ValueError(
      f'{directory}: got a draft head of weights {manifest.base_digest[:12]},'
      f' expected one of {base.name} with weights {base.weights_digest[:12]};'
      ' train a head for these weights, or take the model of this one'
    )
  manifest_lib.check_files(directory, manifest)
  stored = safetensors_files.read_header(directory / FILE)
  tensors = {name: tensor.whole() for name, tensor in stored.items()}
  wanted = jax.eval_shape(
    lambda key: draft_head.init(
      manifest.model_width, manifest.inner_width, key
    ),
    jax.random.key(0),
  )
  shapes = {name: leaf['kernel'].shape for name, leaf in wanted.items()}
  digest = _digest(manifest.base_digest, tensors)
  if digest != manifest.head_digest or shapes != {
    name: x.shape for name, x in tensors.items()
  }:
    raise ValueError(
      f'{directory}: got a draft head with digest {digest[:12]}, expected'
      f' {manifest.head_digest[:12]}; copy or freeze it again'
    )
  head = {name: {'kernel': x} for name, x in tensors.items()}
  return DraftHead(directory=directory, manifest=manifest, head=head)


def _digest(base_digest: str, tensors: Mapping[str, np.ndarray]) -> str:
  own = frozen_format.weights_digest(dict(tensors))
  return hashlib.sha256(f'{base_digest}\0{own}'.encode()).hexdigest()
