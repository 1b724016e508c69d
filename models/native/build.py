"""Builds native functions with the user's compiler, once, and loads them.

They are products, and attention over pages. Each function has a library of its
own, which is kept in a directory of the user. Its name is a digest of all its
inputs: sources, compiler, options, processor and jaxlib, whose headers it
includes. So it is never stale, and machines that share a home directory have
separate libraries. Its last bytes are a digest of all other bytes: a damaged
file counts as absent. It is written under another name and renamed, so
processes that build it at the same time do not disturb each other.

A user who may write into the directory can run code here, as with JAX's own
cache.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import threading

import jax

from models.native import processor

_MODELS = pathlib.Path(__file__).parents[1]
# Sources of functions, below models/.
STORED = 'linear/native/kernel.cc'  # the product with kernels in fewer bits
FEW_ROWS = 'linear/native/few_rows.cc'  # the product of few rows with floats
PAGES = 'attention/kernels/paged_cpu.cc'  # attention over pages
_COMMON = 'native/parts.h', 'native/simd.h'
_HEADERS = {
  STORED: (
    *_COMMON,
    *(f'linear/native/{name}.h' for name in ('floats8', 'formats', 'scales')),
  ),
  FEW_ROWS: _COMMON,
  PAGES: _COMMON,
}
# Of XLA's name, and of the symbol in the library.
_NAMES = {PAGES: ('two_lives_attend', 'TwoLivesAttend')}
_PRODUCT = 'two_lives_multiply', 'TwoLivesMultiply'
_COMPILERS = 'g++', 'clang++', 'c++'
# Products and sums are fused where the source says so, and nowhere else: one
# row has the bits of many rows.
_OPTIONS = (
  '-std=c++17', '-O3', '-DNDEBUG', '-ffp-contract=off', '-fPIC', '-shared',
  '-w',
)  # fmt: skip
NATIVE = ('-march=native',)  # options of the processor that runs this
_SECONDS = 300  # for a compiler; 5 to 10 are usual
_DIGEST_BYTES = 32
_lock = threading.Lock()
_registered: dict[str, str] = {}  # names with XLA, and their instructions


class BuildError(RuntimeError):
  """There is no library; the text says why, on one line."""


def directory() -> pathlib.Path:
  """Returns the directory that keeps libraries, which may not exist."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'two-lives' / 'native'


def registered(
  options: tuple[str, ...] = NATIVE,
  kept_in: pathlib.Path | None = None,
  source: str = STORED,
) -> tuple[str, str]:
  """Returns XLA's name of a function, and the instructions that it uses.

  The first call of a process builds or loads the library and registers it.

  Args:
    options: options of the compiler, for a processor.
    kept_in: directory of the library; default: `directory()`.
    source: `STORED`, `FEW_ROWS` or `PAGES`.

  Raises:
    BuildError: there is no compiler, it fails, or the library cannot be kept or
      loaded.
  """
  with _lock:  # engines start in several threads
    path = built(options, kept_in or directory(), source)
    prefix, symbol = _NAMES.get(source, _PRODUCT)
    name = f'{prefix}_{path.stem}'
    if name not in _registered:
      try:
        library = ctypes.CDLL(str(path))
      except OSError as error:
        raise BuildError(f'the library {path}: {error}') from error
      jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(getattr(library, symbol)), platform='cpu'
      )
      library.TwoLivesInstructions.restype = ctypes.c_char_p
      _registered[name] = library.TwoLivesInstructions().decode()
    return name, _registered[name]


def built(
  options: tuple[str, ...], kept_in: pathlib.Path, source: str = STORED
) -> pathlib.Path:
  """Returns the path of the library; builds it, unless it is there and whole.

  Raises:
    BuildError: the library cannot be built.
  """
  compiler = _compiler()
  path = kept_in / f'{_key(compiler, options, source)}.so'
  try:
    if not _is_whole(path):
      _build(compiler, options, source, path)
  except OSError as error:
    raise BuildError(f'the library {path}: {error}') from error
  return path


def _compiler() -> str:
  """Returns the path of a compiler: $CXX, or the first that is installed."""
  asked = os.environ.get('CXX')
  for name in (asked,) if asked else _COMPILERS:
    if path := shutil.which(name):
      return path
  raise BuildError(
    f'no compiler {asked or ", ".join(_COMPILERS)} on the PATH; install one, as'
    ' apt-get install g++ does'
  )


def _key(compiler: str, options: tuple[str, ...], source: str = STORED) -> str:
  """Returns a digest of everything that the library depends on."""
  version = _run([compiler, '--version']).stdout
  names = source, *_HEADERS[source]
  sources = [(_MODELS / name).read_text() for name in names]
  parts = (
    sources, compiler, version, _OPTIONS, options, platform.platform(),
    processor.described(), importlib.metadata.version('jaxlib'),
  )  # fmt: skip
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _build(
  compiler: str, options: tuple[str, ...], source: str, path: pathlib.Path
) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    built = pathlib.Path(scratch) / 'product.so'
    include = '-isystem', jax.ffi.include_dir(), '-I', str(_MODELS / 'native')
    command = [
      compiler,
      *_OPTIONS,
      *options,
      *include,
      str(_MODELS / source),
    ]
    done = _run([*command, '-o', str(built)])
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if 'error' in line]
      said = (lines or done.stderr.splitlines() or ['no message'])[0]
      raise BuildError(f'{compiler} failed: {said[:200]}')
    data = built.read_bytes()
    built.write_bytes(data + hashlib.sha256(data).digest())
    built.replace(path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
  try:
    return subprocess.run(
      command,
      capture_output=True,
      text=True,
      errors='replace',
      timeout=_SECONDS,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise BuildError(f'{command[0]}: {error}'[:300]) from error


def _is_whole(path: pathlib.Path) -> bool:
  try:
    data = path.read_bytes()
  except OSError:
    return False
  return hashlib.sha256(data[:-_DIGEST_BYTES]).digest() == data[-_DIGEST_BYTES:]
