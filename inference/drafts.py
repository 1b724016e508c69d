"""The model that drafts for another one: read, and compared with it.

Both have the same ids, since one verifies the tokens of the other.
"""

import pathlib

from checks import paths
from frozen import (
  format as frozen_format,
  manifest as manifest_lib,
  stored_kernels,
)
from inference.engine import device_state, engine_config
from inference.engine.drafting import draft_model
from models import model_config
from storage import file_names

_MODEL = 'params'  # the collection that an engine computes with
_FLAG = 'engine.draft_model'


def read(
  config: engine_config.EngineConfig, target: frozen_format.Opened
) -> draft_model.Weights | None:
  """Returns the draft model of a config; its weights are read later.

  Args:
    config: of the engine.
    target: the model that it drafts for.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: it is damaged, no language model, or has other ids.
  """
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
  )


def memory(
  config: engine_config.EngineConfig, platform: str
) -> tuple[int, float]:
  """Returns the bytes of the draft model, and of its KV cache per token.

  They are known from its manifest; 0 if the config has none.

  Args:
    config: of an engine.
    platform: of its device.
  """
  if not config.draft_model:
    return 0, 0.0
  directory = paths.expanded(_FLAG, config.draft_model)
  manifest = manifest_lib.read(pathlib.Path(directory))
  model = model_config.ModelConfig.from_dict(manifest.model)
  weights = stored_kernels.num_bytes(frozen_format.shapes_of(manifest, model))
  backend = draft_model.backend(config, model, manifest.dtype, platform)
  return weights, backend.bytes_per_token(model)


def _tokenizer_files(manifest: manifest_lib.Manifest) -> dict[str, str]:
  return {
    name: digest
    for name, digest in manifest.files.items()
    if name.startswith(f'{file_names.TOKENIZER}/')
  }


def _short(digest: str | None) -> str:
  return digest[:12] if digest else 'none'
