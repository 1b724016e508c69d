"""recipe.json: the recipe of a run's weights, so that they can be made again.

A frozen directory of a run has the recipe beside the manifest, which covers it
like any other file. `python -m studies.rebuild` reads it. Paths lose the
directories of their machine: data and parents are known by their digests.

    experiment   every field of the experiment
    data         digest of the tokens of each source, and of the evaluation
    lineage      digests of other models' weights, by role
    step         of the weights
    made_with    versions of libraries, kind and number of devices
    trace        [step, loss] of steps, spread over the run
"""

from collections.abc import Mapping
import importlib.metadata
import json
import pathlib
import platform
import re
from typing import Any

import jax

from storage import file_names, json_lines, public_paths

FORMAT_VERSION = 1
# Steps in the trace: enough to see where two runs part, few enough to keep.
_FIRST, _MOST = 32, 256
# A path, also after a word, as in perplexity:/texts/book.txt; not an address.
_PATH = re.compile(r'(?:^|(?<=[:=&,]))(?!//)[/~][^:&,]*')
_LIBRARIES = 'jax', 'jaxlib', 'numpy', 'flax', 'optax'


def of_run(
  workdir: pathlib.Path, run: Mapping[str, Any], step: int
) -> dict[str, Any]:
  """Returns the recipe of a run, JSON values; {} for a run without a config.

  Args:
    workdir: directory of the run; its data.json and metrics.jsonl are read.
    run: contents of its run.json.
    step: step of the weights.
  """
  if not isinstance(run.get('config'), Mapping):
    return {}
  return {
    'format_version': FORMAT_VERSION,
    'code_commit': run['code_commit'],
    'experiment': _public(run['config'], run['config'].get('init_from', '')),
    'data': data_digests(_data(workdir)),
    'lineage': run['lineage'],
    'step': step,
    'made_with': run.get('made_with', {}),
    'trace': trace(workdir, step),
  }


def made_with() -> dict[str, Any]:
  """Returns the versions and devices that decide whether bits are equal."""
  devices = jax.devices()
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    'device': devices[0].device_kind,
    'devices': len(devices),
  }


def data_digests(described: Mapping[str, Any]) -> dict[str, str]:
  """Returns the digest of the tokens of each source, by name.

  Args:
    described: contents of a data.json; {} has none.
  """
  sources = [
    (source['name'], source['digest'])
    for source in described.get('sources', ())
    if 'digest' in source
  ]
  evaluation = described.get('evaluation', {})
  if 'digest' in evaluation:
    sources.append(('evaluation', evaluation['digest']))
  return dict(sources)


def trace(workdir: pathlib.Path, step: int) -> list[list[float]]:
  """Returns [step, loss] of steps of a run: the first ones, then some.

  Args:
    workdir: directory of the run.
    step: the last step.
  """
  path = workdir / file_names.METRICS
  if not path.exists():
    return []
  lines = path.read_bytes().split(b'\n')
  records, _ = json_lines.parse(lines, ('kind', 'step'))
  found = [
    [record['step'], record['loss']]
    for record in records
    if record['kind'] == 'train' and record['step'] <= step
  ]
  rest = found[_FIRST:]
  stride = -(-len(rest) // (_MOST - _FIRST)) or 1
  return found[:_FIRST] + rest[stride - 1 :: stride]


def read(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the recipe of a frozen directory.

  Raises:
    ValueError: it has no recipe, or a recipe of another version.
  """
  path = directory / file_names.RECIPE
  if not path.is_file():
    raise ValueError(
      f'{directory}: got no {file_names.RECIPE}, expected the directory of a'
      ' run, frozen since there are recipes; imports and quantised weights have'
      ' none: make them again by the command that made them'
    )
  try:
    recipe = json.loads(path.read_text('utf-8'))
    version = recipe['format_version']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path}: got a file that cannot be read ({error!r}), expected a recipe;'
      ' copy the directory again'
    ) from None
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{path}: got format version {version!r}, expected {FORMAT_VERSION}; use'
      ' the code that wrote it'
    )
  return recipe


def _data(workdir: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads((workdir / file_names.DATA).read_text('utf-8'))
  except (OSError, ValueError):
    return {}


def _public(value: Any, parent: str) -> Any:
  """Returns values with paths that do not name the machine.

  Directories of derived files only are left out.

  Args:
    value: JSON values.
    parent: the directory of init_from, whose files stay below it.
  """
  if isinstance(value, str):
    if parent and value.startswith(f'{parent}/'):
      return public_paths.public(parent) + value.removeprefix(parent)
    return _PATH.sub(lambda found: public_paths.public(found[0]), value)
  if isinstance(value, Mapping):
    return {
      key: _public(item, parent)
      for key, item in value.items()
      if key != 'data_dir'
    }
  if isinstance(value, list):
    return [_public(item, parent) for item in value]
  return value
