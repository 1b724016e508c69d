"""Fetches a model from a hub: only the files that an import reads.

`huggingface_hub` (requirements-hub.txt) does the talking, the caching and the
checking of what arrives; a directory that is there already needs none of it.
"""

import os
import pathlib
from typing import Any, NamedTuple

PATTERNS = (
  'config.json',
  'generation_config.json',
  'model.safetensors',
  'model-*-of-*.safetensors',
  'model.safetensors.index.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'additional_chat_templates/*.jinja',
)


class Fetched(NamedTuple):
  """A directory with a model's files."""

  directory: pathlib.Path
  origin: dict[str, str]


def fetch(source: str, revision: str = '', download: Any = None) -> Fetched:
  """Returns the directory of a model, fetched if it is the name of one.

  Args:
    source: a directory, a GGUF file, or the name of a repository, 'org/name'.
    revision: a commit, branch or tag of a repository; '' for its main branch.
    download: `huggingface_hub.snapshot_download`, or what stands in for it.

  Raises:
    FileNotFoundError: it is neither, or the hub does not give it away.
    ValueError: a revision of a directory, or `huggingface_hub` is missing.
  """
  path = pathlib.Path(source).expanduser()
  if path.exists():
    if revision:
      raise ValueError(
        f'--revision: got {revision!r} for the directory {source}, expected'
        ' none: it is what it is'
      )
    return Fetched(path, {'source': str(path)})
  if not _is_repository(source):
    raise FileNotFoundError(
      f'{source}: got no such directory, expected one with a Hugging Face'
      ' model, a GGUF file, or the name of a repository, as in org/name'
    )
  download = download or _downloader()
  try:
    directory = pathlib.Path(
      download(source, revision=revision or None, allow_patterns=list(PATTERNS))
    )
  except (OSError, ValueError) as error:
    raise FileNotFoundError(
      f'{source}: got {error}, expected to fetch it from the hub; check the'
      ' name, the network and what HF_TOKEN may read, or fetch it elsewhere and'
      ' give the directory'
    ) from None
  # The cache names a snapshot after its commit.
  return Fetched(directory, {'source': source, 'revision': directory.name})


def _is_repository(source: str) -> bool:
  parts = source.split('/')
  return (
    len(parts) == 2
    and all(parts)
    and not source.startswith(('.', '~', os.sep))
    and all(c.isalnum() or c in '-_.' for part in parts for c in part)
  )


def _downloader() -> Any:
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      'huggingface_hub is not installed, expected it to fetch a model; pip'
      ' install -r requirements-hub.txt, or give a directory'
    ) from None
  return huggingface_hub.snapshot_download
