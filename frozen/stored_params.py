"""The weights of a frozen directory on disk: written by orbax, read in order.

Orbax stores each array as Zarr in one OCDBT database. Tensorstore, on which
orbax is built, reads both. So the weights are read without orbax: importing it
and restoring with it takes longer than reading the bytes (135M float32: 1.7 s
of CPU time in place of 0.4), and needs the weights twice.
"""

import collections
from collections.abc import Iterator, Mapping
import os
import pathlib
from typing import Any

import jax
import numpy as np
import tensorstore

_ALIGNMENT = 64  # bytes; JAX uses memory with this alignment on a CPU directly
_NUM_AHEAD = 4  # arrays that are read at once
_METADATA = '/.zarray'


def checkpointer() -> Any:
  """Returns a checkpointer of orbax that waits for no other process.

  In a run of several processes, one process writes a frozen directory, and each
  process reads it for itself.
  """
  import orbax.checkpoint as ocp  # imported here: reading does not need it

  return ocp.StandardCheckpointer(multiprocessing_options=_alone())


def _alone():
  import orbax.checkpoint as ocp

  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me,
    active_processes={me},
    barrier_sync_key_prefix=f'frozen_{me}',
  )


def save(directory: pathlib.Path, params: Any) -> None:
  """Writes the weights with one copy of them in memory.

  The defaults of orbax take three times the weights: it copies numpy arrays
  before it writes them, and it keeps all compressed data at once.
  """
  import orbax.checkpoint as ocp

  params = jax.tree.map(np.asarray, _plain(params))
  params = jax.tree.map(lambda x: x.view(_written_dtype(x.dtype)), params)
  options = _alone()
  if jax.process_count() == 1:
    # With several processes, orbax refuses jax arrays of one process.
    cpu = jax.local_devices(backend='cpu')[0]
    params = jax.device_put(params, cpu)  # no copy if the memory is aligned
  handler = ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=1,
    use_compression=False,
    multiprocessing_options=options,
  )
  with ocp.Checkpointer(handler, multiprocessing_options=options) as writer:
    writer.save(directory, args=ocp.args.PyTreeSave(params))
  # orbax only needs the file to exist, and it holds a path of this machine.
  for marker in directory.rglob('commit_success.txt'):
    marker.write_text('')


def as_written(shapes: Any) -> Any:
  """Returns the shapes of arrays on the disk."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, _written_dtype(x.dtype)), shapes
  )


def _written_dtype(dtype: Any) -> np.dtype:
  """Returns the dtype that an array has on the disk."""
  # Zarr does not know all floats of 8 bits: their bytes are written.
  is_narrow = dtype.itemsize == 1 and dtype.name.startswith('float8')
  return np.dtype(np.uint8) if is_narrow else np.dtype(dtype)


def _plain(tree: Any) -> Any:
  """Returns a tree of dicts alone: kernels in fewer bits are dicts, too."""
  made: dict[str, Any] = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    *above, last = [key.key for key in path]
    place = made
    for name in above:
      place = place.setdefault(name, {})
    place[last] = leaf
  return made


def open_all(directory: pathlib.Path) -> dict[str, tensorstore.TensorStore]:
  """Returns the stored arrays by path, such as 'params/final_norm/scale'.

  Their values are not read yet.

  Raises:
    ValueError: they cannot be opened.
  """
  # Without a cache: every byte is read once.
  context = tensorstore.Context({'cache_pool': {'total_bytes_limit': 0}})
  database = {
    'driver': 'ocdbt',
    'base': f'file://{directory.absolute()}{os.sep}',
  }
  keys = tensorstore.KvStore.open(database, context=context).result().list()
  names = [
    key.decode().removesuffix(_METADATA)
    for key in keys.result()
    if key.endswith(_METADATA.encode())
  ]
  opening = {
    name.replace('.', '/'): tensorstore.open(
      {'driver': 'zarr', 'kvstore': {**database, 'path': name}},
      open=True,
      read=True,
      context=context,
    )
    for name in names
  }
  return {name: each.result() for name, each in opening.items()}


def shapes(
  stored: Mapping[str, tensorstore.TensorStore],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of each stored array."""
  return {
    name: jax.ShapeDtypeStruct(each.shape, each.dtype.numpy_dtype)
    for name, each in stored.items()
  }


def read_all(
  stored: Mapping[str, tensorstore.TensorStore],
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields each array with its path, in the order of paths.

  A few arrays are read ahead; the others need no memory before their turn.
  """
  reading = collections.deque()
  for name in sorted(stored):
    source = stored[name]
    array = _aligned(source.shape, np.dtype(source.dtype.numpy_dtype))
    reading.append((name, array, tensorstore.array(array).write(source)))
    if len(reading) == _NUM_AHEAD:
      yield _first(reading)
  while reading:
    yield _first(reading)


def _first(reading) -> tuple[str, np.ndarray]:
  name, array, done = reading.popleft()
  done.result()
  return name, array


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  num_bytes = int(np.prod(shape)) * dtype.itemsize
  memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + num_bytes].view(dtype).reshape(shape)
