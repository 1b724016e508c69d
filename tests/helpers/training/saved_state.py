"""The arrays and the progress that a checkpoint on the disk holds."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from storage import file_names


def arrays_and_progress(
  workdir: pathlib.Path, step: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns every array of a checkpoint by name, and its progress."""
  directory = workdir / file_names.CHECKPOINTS / str(step)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = {}
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ('params', 'opt_state'):
      tree = checkpointer.metadata(directory / item).item_metadata.tree
      target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
      )
      restored = checkpointer.restore(directory / item, target)
      for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  progress = json.loads((directory / 'progress.json').read_text())
  return arrays, progress
