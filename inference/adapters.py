"""The adapters of a command line: directories, each under a name.

    named = adapters.parsed(['sql=runs/sql/frozen', 'poems=poems'])
    found = adapters.read(named, base)

Each name is a model that answers beside the base.
"""

from collections.abc import Iterable, Mapping, Sequence
import logging

from checks import expect, paths
from frozen import adapters as frozen_adapters, format as frozen_format
from models.layers import adapters as adapters_lib

_LOG = logging.getLogger('uvicorn.error')


def parsed(texts: Sequence[str]) -> dict[str, str]:
  """Returns the directories of adapters by name, from texts NAME=DIR.

  Raises:
    ValueError: a text is not NAME=DIR, a name has an @, or two texts have the
      same name.
  """
  found: dict[str, str] = {}
  for text in texts:
    name, directory = paths.named('--adapters', text)
    if '@' in name:
      raise ValueError(
        f'--adapters: got the name {expect.shown(name)}, expected one without'
        ' @; rename it'
      )
    if name in found:
      raise ValueError(
        f'--adapters: got the name {expect.shown(name)} twice, expected'
        ' different names; rename one'
      )
    found[name] = directory
  return found


def read(
  named: Mapping[str, str], base: frozen_format.Opened
) -> dict[str, frozen_adapters.Adapter]:
  """Returns the adapters in directories, by name; their digests are verified.

  Raises:
    FileNotFoundError: a directory has no adapter.
    ValueError: an adapter is damaged, or belongs to another base.
  """
  found = {}
  for name, directory in named.items():
    adapter = frozen_adapters.read(directory, base)
    if (form := adapter.manifest.base_form) != 'float':
      _LOG.warning(
        '%s: trained beside kernels of %s and served beside kernels of %s, so'
        ' answers differ a little; `python -m frozen.adapters merge` writes a'
        ' frozen directory of the function that was trained',
        directory,
        form,
        base.manifest.dtype,
      )
    found[name] = adapter
  return found


def ranks(found: Iterable[frozen_adapters.Adapter]) -> list[int]:
  """Returns for each adapter the largest rank of its matrices."""
  return [
    max(entry[adapters_lib.A].shape[-1] for _, entry in entries)
    for entries in (adapters_lib.entries(each.tree) for each in found)
  ]
