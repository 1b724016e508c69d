"""Compiled programs on disk that are found without tracing.

JAX's own cache knows a program by its text, so that every start traces and
lowers all programs to find them there: 0.2 s or more for each. Here the name of
a program is a digest of everything that its text is made of: the source code,
versions and settings of the libraries, the processor, the model, the shapes.
The programs are the same, and so are their results, bit for bit.

A file that is damaged counts as absent. Files hold native code, as those of
JAX's cache do: a user who may write into the directory can run code here.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import math
import os
import pathlib
import pickle
import secrets
import sys
from typing import Any

import jax
from jax._src import config as jax_config
from jax.experimental import serialize_executable

from models.native import processor
from storage import atomic

_ROOT = pathlib.Path(__file__).parents[3]
_SOURCES = 'inference', 'models'  # packages that programs are traced from
_LIBRARIES = 'jax', 'jaxlib', 'flax', 'numpy'
_DIGEST_BYTES = 32


class Store:
  """The stored programs of one engine."""

  def __init__(
    self, directory: pathlib.Path | None, device: jax.Device, *parts: Any
  ):
    """Opens the store; without a directory it keeps nothing.

    Args:
      directory: created when a program is kept.
      device: that programs run on. Only CPUs have stored programs.
      *parts: what the programs of the engine depend on, apart from their names.
        Their texts must be equal for equal parts, in every process.
    """
    is_used = directory is not None and device.platform == 'cpu'
    self._directory = directory if is_used else None
    self._device = device
    self._text = f'{_environment()}\0{device.id}\0{parts}' if is_used else ''

  def load(self, name: Any) -> Any:
    """Returns a program, or None if it is not stored."""
    if self._directory is None:
      return None
    try:
      data = self._path(name).read_bytes()
    except OSError:
      return None
    digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
      return None  # cut short, by a kill or a full disk
    try:
      return _Unpickler(io.BytesIO(data), self._device).load()
    except Exception:
      return None  # of a library that the key does not tell apart

  def keep(self, name: Any, lowered: Any) -> Any:
    """Compiles and returns a program; stores it if that is possible."""
    if self._directory is None:
      return lowered.compile()
    program = _compiled_anew(lowered)
    file = io.BytesIO()
    try:
      _Pickler(file).dump(program)
      data = file.getvalue()
      self._directory.mkdir(parents=True, exist_ok=True)
      data = hashlib.sha256(data).digest() + data
      atomic.write_bytes(self._path(name), data, durable=False)
    except (NotImplementedError, ValueError, OSError):
      pass  # constants within the program, or a disk that is full or read-only
    return program

  def _path(self, name: Any) -> pathlib.Path:
    assert self._directory is not None
    digest = hashlib.sha256(f'{self._text}\0{name!r}'.encode()).hexdigest()
    return self._directory / f'{digest}.program'


def _compiled_anew(lowered: Any) -> Any:
  """Returns a compiled program that is from no cache of JAX.

  XLA:CPU (jax 0.10) writes a program that it has read itself without a part of
  its code.
  """
  # An option of another platform, which makes the keys of JAX's caches differ.
  options = {'xla_gpu_kernel_cache_file': secrets.token_hex(8)}
  # Nothing would find an entry of that key: JAX's cache shall not write it.
  with jax_config.persistent_cache_min_compile_time_secs(math.inf):
    return lowered.compile(options)


class _Pickler(pickle.Pickler):
  def persistent_id(self, obj: Any) -> Any:
    if isinstance(obj, jax.stages.Compiled):
      return serialize_executable.serialize(obj)
    return None


class _Unpickler(pickle.Unpickler):
  def __init__(self, file: io.BytesIO, device: jax.Device):
    super().__init__(file)
    self._device = device

  def persistent_load(self, pid: Any) -> Any:
    return serialize_executable.deserialize_and_load(
      *pid, backend=self._device.client, execution_devices=[self._device]
    )


def describe(value: Any) -> str:
  """Returns the type, shape and place of all leaves of a tree as text."""
  leaves, structure = jax.tree.flatten(value)
  kinds = [
    f'{leaf.dtype}{leaf.shape}{getattr(leaf, "sharding", None)}'
    for leaf in leaves
  ]
  return f'{structure}{kinds}'


def describe_ports(ports: Any) -> str:
  """Returns the fields of a dataclass of functions as text."""

  def text(value: Any) -> str:
    if dataclasses.is_dataclass(value):  # a port around another one
      return f'{type(value).__qualname__}({describe_ports(value)})'
    name = getattr(value, '__qualname__', '<locals>')
    # The text of a function within a function has its address: such a program
    # is never found again.
    return repr(value) if '<' in name else f'{value.__module__}.{name}'

  return str([text(value) for value in vars(ports).values()])


@functools.cache
def _environment() -> str:
  """Returns everything outside the engine that a program depends on."""
  sources = hashlib.sha256()
  for package in _SOURCES:
    # Native code has its digest in the name of the port that calls it.
    for path in sorted((_ROOT / package).rglob('*.py')):
      text = path.read_bytes()
      sources.update(f'{path.relative_to(_ROOT)}\0{len(text)}\0'.encode())
      sources.update(text)
  settings = {
    name: value
    for name, value in jax.config.values.items()
    if 'cache' not in name  # directories, for example
  }
  return repr(
    (
      sources.hexdigest(),
      [importlib.metadata.version(name) for name in _LIBRARIES],
      sys.version_info[:2],
      sorted(settings.items()),
      os.environ.get('XLA_FLAGS', ''),
      os.cpu_count(),
      processor.described(),
    )
  )
