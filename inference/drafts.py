"""The model or the head that drafts for a model: read, and compared with it.

A draft model has the same ids, since the other one verifies its tokens. A draft
head was trained for one set of weights.
"""

import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from checks import paths
from frozen import (
  draft_heads,
  format as frozen_format,
  manifest as manifest_lib,
  stored_kernels,
)
from inference.engine import device_state, engine_config, execution
from inference.engine.drafting import draft_head, draft_model, making
from models import model_config
from storage import file_names

_MODEL = 'params'  # the collection that an engine computes with
_FLAG = 'engine.draft_model'
_HEAD_FLAG = 'engine.draft_head'
DIRECTORIES = 'draft_model', 'draft_head'  # fields of the config of an engine


class Memory(NamedTuple):
  """The bytes of what drafts, on each device of an engine."""

  kind: str = ''  # model or head
  weights: int = 0
  # Of a head: the rows of the model's unembedding that it has beside them.
  num_rows: int = 0
  row_bytes: int = 0
  bytes_per_token: float = 0.0  # of a sequence

  def num_bytes(self, vocab_size: int) -> int:
    """Returns the bytes of weights.

    Args:
      vocab_size: ids of the model that a device has.
    """
    return self.weights + min(self.num_rows, vocab_size) * self.row_bytes


def read(
  config: engine_config.EngineConfig, target: frozen_format.Opened
) -> making.Weights | None:
  """Returns what drafts with a config; a model's weights are read later.

  Args:
    config: of the engine.
    target: the model that it drafts for.

  Raises:
    FileNotFoundError: there is no such directory.
    ValueError: it is damaged, no language model, has other ids, or is a head of
      other weights.
  """
  if config.draft_head:
    directory = paths.expanded(_HEAD_FLAG, config.draft_head)
    found = draft_heads.read(directory, target.manifest)
    return draft_head.Weights(
      head=found.head,
      num_ids=found.manifest.num_ids,
      dtype=target.manifest.dtype,
      digest=found.manifest.head_digest,
    )
  if not config.draft_model:
    return None
  directory = paths.expanded(_FLAG, config.draft_model)
  frozen = frozen_format.open_directory(directory)
  frozen.manifest.check_language_model(_FLAG, directory)
  found, wanted = map(_tokenizer_files, (frozen.manifest, target.manifest))
  if found != wanted:
    differs = next(
      name
      for name in sorted(found.keys() | wanted.keys())
      if found.get(name) != wanted.get(name)
    )
    raise ValueError(
      f'{_FLAG}: got {directory} with another tokenizer ({differs} has digest'
      f' {_short(found.get(differs))}), expected that of {target.directory}'
      f' ({_short(wanted.get(differs))}): a draft has the ids of the model; use'
      ' a model that was trained with the same tokenizer'
    )
  shapes = {_MODEL: frozen.shapes[_MODEL]}
  return draft_model.Weights(
    config=frozen.config,
    params=device_state.Unread(
      shapes, lambda convert: {_MODEL: frozen.read_params(convert)[_MODEL]}
    ),
    dtype=frozen.manifest.dtype,
    digest=frozen.manifest.weights_digest,
  )


def memory(
  config: engine_config.EngineConfig,
  target: model_config.ModelConfig,
  dtype: Any,
  backend: execution.Backend,
  platform: str,
) -> Memory:
  """Returns the bytes of what drafts with a config; it reads manifests alone.

  Args:
    config: of an engine.
    target: the model that it drafts for.
    dtype: of that model.
    backend: of that model.
    platform: of its device.

  Raises:
    FileNotFoundError: there is no such directory.
    ValueError: a head is of a model of another width.
  """
  if config.draft_head:
    directory = paths.expanded(_HEAD_FLAG, config.draft_head)
    found = draft_heads.read_manifest(directory)
    width = target.model_width
    if found.model_width != width:
      raise ValueError(
        f'{_HEAD_FLAG}: got {directory} for a model of width'
        f' {found.model_width}, expected one for width {width}; give the head'
        ' that was trained for this model'
      )
    stored = device_state.hidden_dtype(dtype, backend.kv_dtype)
    ports = draft_head.Ports.of(
      backend.execution, dtype, draft_head.most_rows(config)
    )
    itemsize = jnp.dtype(ports.dtype).itemsize
    return Memory(
      config.speculation,
      found.num_params * itemsize,
      found.num_ids,
      width * itemsize,
      width * jnp.dtype(stored).itemsize,
    )
  if not config.draft_model:
    return Memory()
  directory = paths.expanded(_FLAG, config.draft_model)
  manifest = manifest_lib.read(pathlib.Path(directory))
  model = model_config.ModelConfig.from_dict(manifest.model)
  weights = stored_kernels.num_bytes(frozen_format.shapes_of(manifest, model))
  drafting = draft_model.backend(config, model, manifest.dtype, platform)
  per_token = drafting.bytes_per_token(model)
  return Memory(config.speculation, weights, bytes_per_token=per_token)


def _tokenizer_files(manifest: manifest_lib.Manifest) -> dict[str, str]:
  return {
    name: digest
    for name, digest in manifest.files.items()
    if name.startswith(f'{file_names.TOKENIZER}/')
  }


def _short(digest: str | None) -> str:
  return digest[:12] if digest else 'none'
