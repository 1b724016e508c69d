"""The cache of compiled programs on disk, for the next start.

JAX writes an entry in place. A kill or a full disk leaves a part of one, which
JAX neither reads nor replaces: each later start would warn and compile again.
`use` removes such entries first.

Programs of several CPU devices are not kept. In a fresh one, XLA:CPU (jaxlib
0.10 to 0.12) runs the collectives of a device one after another, in the same
order on all devices; in a program read from disk, each collective counts as
independent. Devices then wait for different collectives for ever, and XLA ends
the process after 40 s. Measured on a pipeline with adapters over 8 devices: 5
of 6 programs from disk hung within 400 steps, none of 6 fresh programs within
2,000.
"""

import functools
import os
import pathlib
import time
import zlib

VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
_SUFFIX = '-cache'  # of the name of an entry
_CHECKED = 'checked'  # entries that are older than this file were whole
_directory: pathlib.Path | None = None
_leaves_out_collectives = False
_ZSTANDARD = b'\x28\xb5\x2f\xfd'


HELP = (
  'Directory that keeps compiled programs for the next start; empty keeps'
  f' none. Default: {VARIABLE}, else ~/.cache/two-lives/xla.'
)  # of --compilation_cache, which both lives have


def directory_of(flag: str | None) -> pathlib.Path | None:
  """Returns the directory of a value of --compilation_cache; None keeps none.

  Args:
    flag: None if it was not given.
  """
  if flag is None:
    flag = os.environ.get(VARIABLE)
  if flag is None:
    base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    return pathlib.Path(base) / 'two-lives' / 'xla'
  return pathlib.Path(flag).expanduser() if flag else None


def directory() -> pathlib.Path | None:
  """Returns the directory of the last `use`, None before."""
  return _directory


def use(directory: pathlib.Path) -> None:
  """Makes JAX keep its programs in `directory`; removes incomplete entries."""
  import jax  # here: `is_whole` is used before JAX is configured

  global _directory
  _directory = directory
  remove_incomplete(directory)
  leave_out_collectives()
  for name, value in {
    'jax_compilation_cache_dir': str(directory),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
    # XLA's own caches put the directory into the key of every entry, so that a
    # copy of the directory would miss all of them.
    'jax_persistent_cache_enable_xla_caches': 'none',
  }.items():
    jax.config.update(name, value)


def leave_out_collectives() -> None:
  """Makes JAX compile each program of several CPU devices anew."""
  from jax._src import compiler  # JAX has no public way to tell programs apart

  global _leaves_out_collectives
  if _leaves_out_collectives:
    return
  _leaves_out_collectives = True
  key_of = compiler._get_cache_key

  @functools.wraps(key_of)
  def key_or_none(*args, backend, devices, **kwargs):
    if backend.platform == 'cpu' and devices.size > 1:
      return None  # JAX neither reads nor writes such a program
    return key_of(*args, backend=backend, devices=devices, **kwargs)

  compiler._get_cache_key = key_or_none


def remove_incomplete(directory: pathlib.Path) -> None:
  """Removes incomplete entries among the entries since the last call.

  Another process may be writing an entry now. Its program is compiled once
  more.
  """
  if not directory.is_dir():
    return
  now, mark = time.time(), directory / _CHECKED
  try:
    checked = mark.stat().st_mtime if mark.exists() else 0.0
    for path in directory.glob(f'*{_SUFFIX}'):
      if path.stat().st_mtime >= checked and not is_whole(path.read_bytes()):
        path.unlink(missing_ok=True)
    mark.touch()
    # The time before the check, and a second for file systems that round.
    os.utime(mark, (now - 1, now - 1))
  except OSError:
    pass  # read-only, or another process removes entries: JAX uses the rest


def is_whole(entry: bytes) -> bool:
  """Returns whether an entry can be decompressed to its end."""
  if entry.startswith(_ZSTANDARD):
    return _is_whole_zstandard(entry)
  reader = zlib.decompressobj()
  try:
    reader.decompress(entry)
  except zlib.error:
    return False
  return reader.eof


def _is_whole_zstandard(entry: bytes) -> bool:
  """Returns the same for Zstandard, which JAX uses if it is installed."""
  try:
    import zstandard  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError:
    return False  # JAX cannot read the entry either
  reader = zstandard.ZstdDecompressor().decompressobj()
  try:
    reader.decompress(entry)
  except zstandard.ZstdError:
    return False
  return reader.eof
