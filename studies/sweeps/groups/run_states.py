"""The state of one run of a group on disk, in the run's workdir.

`state-STEP.npz` has the bytes of every array. Runs are saved one by one, since
they are independent: a run may continue beside other runs than before. A kill
between two files leaves runs at different steps, so the step before is kept
until all runs of the group have the new step.
"""

from collections.abc import Sequence
import io
import pathlib
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from storage import atomic
from studies.sweeps.groups import together


def steps(workdir: pathlib.Path) -> set[int]:
  """Returns the steps with a saved state."""
  return {
    int(path.stem.removeprefix(together.STATE))
    for path in workdir.glob(f'{together.STATE}*.npz')
  }


def save(workdir: pathlib.Path, step: int, state: Any) -> None:
  """Saves the state of one run.

  Args:
    state: host arrays; keys as their data.
  """
  arrays: dict[str, Any] = {
    str(i): np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)
    for i, leaf in enumerate(jax.tree.leaves(state))
  }
  file = io.BytesIO()
  np.savez(file, **arrays)
  atomic.write_bytes(_path(workdir, step), file.getvalue())


def keep(workdir: pathlib.Path, kept: Sequence[int]) -> None:
  """Deletes the states of all other steps."""
  for step in steps(workdir) - set(kept):
    _path(workdir, step).unlink(missing_ok=True)


def load(workdir: pathlib.Path, step: int, like: Any) -> Any:
  """Returns the state of a run at a step, as host arrays.

  Args:
    like: shapes and dtypes of the arrays; keys as their data.

  Raises:
    ValueError: the file is damaged, or of another model or optimizer.
  """
  path = _path(workdir, step)
  leaves, treedef = jax.tree.flatten(like)
  try:
    with np.load(path) as file:
      found = [file[str(i)] for i in range(len(leaves))]
    arrays = [
      np.frombuffer(data.tobytes(), leaf.dtype).reshape(leaf.shape)
      for data, leaf in zip(found, leaves, strict=True)
    ]
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path}: got a state that cannot be read ({error}), expected the state'
      ' of this trial; delete it, and the trial begins again'
    ) from None
  return treedef.unflatten(arrays)


def raw(state: Any) -> Any:
  """Returns a state with the data of its key in place of the key."""
  return state.replace(key=jax.random.key_data(state.key))


def with_key(state: Any) -> Any:
  """Returns the state of `raw`."""
  return state.replace(key=jax.random.wrap_key_data(jnp.asarray(state.key)))


def _path(workdir: pathlib.Path, step: int) -> pathlib.Path:
  return workdir / f'{together.STATE}{step}.npz'
