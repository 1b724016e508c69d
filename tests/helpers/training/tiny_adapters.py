"""Random adapters of the tiny models, large enough to change every answer."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen import adapters as frozen_adapters, format as frozen_format
from frozen.huggingface import peft_files
from inference.engine import adapter_table
from models import layout
from models.layers import adapters as adapters_lib
from storage import file_names
from tests.helpers import frozen_dirs


def tree(
  params: Any,
  *,
  seed: int,
  rank: int = 2,
  has_gain: bool = False,
  share: float = 1.0,
) -> dict[str, Any]:
  """Returns an adapter of separate layers.

  Args:
    params: of the base.
    seed: of its numbers.
    rank: of every layer.
    has_gain: whether it has gains, as DoRA.
    share: of the layers that it adapts, at least one.
  """
  rng = np.random.default_rng(seed)
  layers = sorted(adapter_table.layer_shapes(params).items())
  kept = rng.permutation(len(layers))[: max(1, round(share * len(layers)))]
  found = {}
  for path, (width, out) in [layers[n] for n in sorted(kept)]:
    found[path] = {
      'a': jnp.asarray(rng.normal(0, 0.3, (width, rank)), jnp.float32),
      'b': jnp.asarray(rng.normal(0, 0.3, (rank, out)), jnp.float32),
    }
    if has_gain:
      gain = rng.normal(1, 0.2, out)
      found[path]['gain'] = jnp.asarray(gain, jnp.float32)
  return adapters_lib.nested(found)


def merged(params: Any, adapter: dict[str, Any]) -> Any:
  """Returns the params with an adapter in them, by NumPy in float64."""
  by_path = dict(adapters_lib.entries(adapter))

  def leaf(keys, x):
    _, *names, last = [key.key for key in keys]
    entry = by_path.get('/'.join(names)) if last == 'kernel' else None
    if entry is None:
      return x
    a, b = (np.asarray(entry[name], np.float64) for name in ('a', 'b'))
    whole = np.asarray(x, np.float64) + a @ b
    whole *= np.asarray(entry.get('gain', 1), np.float64)
    return jnp.asarray(whole, x.dtype)

  return jax.tree_util.tree_map_with_path(leaf, params)


def write(
  directory: pathlib.Path,
  base_directory: pathlib.Path,
  *,
  seed: int,
  rank: int = 2,
  **texts: str,
) -> frozen_adapters.AdapterManifest:
  """Writes an adapter directory of a frozen directory.

  Args:
    directory: that is made.
    base_directory: of the base.
    seed: of the numbers.
    rank: of every layer.
    **texts: chat_template, or generation as JSON; else those of the base.
  """
  base = frozen_format.open_directory(base_directory)
  params, _ = layout.unstack(base.read_params(), base.config)
  layers = {
    path: peft_files.Layer(
      np.asarray(entry['a']), np.asarray(entry['b']), float(rank), 1.0
    )
    for path, entry in adapters_lib.entries(tree(params, seed=seed, rank=rank))
  }
  return frozen_adapters.write(
    directory,
    peft_files.Files(layers, False, False),
    base,
    provenance=frozen_dirs.provenance(experiment=f'adapter {seed}', step=seed),
    base_form='float',
    texts={
      file_names.CHAT_TEMPLATE: texts.get('chat_template', ''),
      file_names.GENERATION: texts.get('generation', '{}'),
    },
  )
