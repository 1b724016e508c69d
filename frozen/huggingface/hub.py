"""Downloads of a model from the hub: only the files that an import reads.

`huggingface_hub` (requirements-hub.txt) downloads, caches and verifies them. A
local directory needs no `huggingface_hub`.
"""

import os
import pathlib
from typing import Any, NamedTuple

PATTERNS = (
  'config.json', 'generation_config.json', 'model.safetensors',
  'model-*-of-*.safetensors', 'model.safetensors.index.json', 'tokenizer.json',
  'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
  'chat_template.jinja', 'additional_chat_templates/*.jinja',
)  # fmt: skip


class Fetched(NamedTuple):
  """A directory with the files of a model, and its origin."""

  directory: pathlib.Path
  origin: dict[str, str]  # for the manifest: no path of this machine


def fetch(source: str, revision: str = '', download: Any = None) -> Fetched:
  """Returns the directory of a model, downloaded if `source` is a repository.

  Args:
    source: a directory, a GGUF file, or the name of a repository, 'org/name'.
    revision: a commit, branch or tag of a repository; '' for its main branch.
    download: replaces `huggingface_hub.snapshot_download` in tests.

  Raises:
    FileNotFoundError: there is no such directory, or the download failed.
    ValueError: a directory has a `revision`, or `huggingface_hub` is missing.
  """
  path = pathlib.Path(source).expanduser()
  if path.exists():
    if revision:
      raise ValueError(
        f'--revision: got {revision!r} for the directory {source}, expected'
        ' none; only repositories on the hub have revisions'
      )
    return Fetched(path, {'source': path.resolve().name})
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
      f'{source}: got {error}, expected a download from the hub; check the'
      ' name, the network and the rights of HF_TOKEN, or download it elsewhere'
      ' and pass the directory'
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
      'huggingface_hub is not installed, expected it to download a model; pip'
      ' install -r requirements-hub.txt, or pass a directory'
    ) from None
  return huggingface_hub.snapshot_download
