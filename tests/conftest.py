"""The environment of every test, set before anything imports JAX.

There are eight fake CPU devices, so that one machine tests meshes and pmap.
Silent rank promotion is an error. Absl flags count as parsed: grain's readers
in several processes need this outside `absl.app.run`.

Compiled programs are kept between sessions (`helpers/compiled_programs.py`).
In a worker's memory they stay until it has grown too large. Files that took
longest before start first. Tests over their time budget are listed at the end
of a session. A request without a seed gets one of its test, not a random one.
"""

import atexit
import collections
import contextlib
import ctypes
import gc
import importlib.metadata
import itertools
import os
import pathlib
import sys
import zlib

from absl import flags
import pytest

from hardware import compilation_cache
from inference.sampling import settings as settings_lib
from tests.helpers import compiled_programs, tiers

NUM_FAKE_DEVICES = 8
# Tests compile far more than they compute. Without LLVM's optimisation the
# suite takes less than half the time; matmuls are library calls either way. The
# older emitter of fusions and one LLVM module per program bring the compilation
# of a small mixture's training step from 5 to 1 s (2 cores, jax 0.10.2).
COMPILE_QUICKLY = (
  '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # XLA ends the process at a flag that it does not know; jax 0.12 has only the
  # newer emitter.
  COMPILE_QUICKLY += ' --xla_cpu_use_fusion_emitters=false'
# A device that waits for the others of a collective gives up after 40 s, and
# takes the process along. On a busy machine eight devices can take longer.
WAIT_LONGER = ' --xla_cpu_collective_call_terminate_timeout_seconds=300'


def _set_environment() -> compiled_programs.CompiledPrograms:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      COMPILE_QUICKLY + WAIT_LONGER,
      os.environ.get(
        'XLA_FLAGS', ''
      ),  # where a flag is repeated, the last wins
      f'--xla_force_host_platform_device_count={NUM_FAKE_DEVICES}',
    ]
  )
  os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
  # A library must not download anything by default.
  os.environ['HF_HUB_OFFLINE'] = '1'
  # Child processes of a test find its compiled programs by this variable.
  programs = compiled_programs.CompiledPrograms(
    compiled_programs.default_store()
  )
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(programs.directory)
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  # Otherwise XLA's own caches put this process's directory into every key.
  os.environ['JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES'] = 'none'
  compilation_cache.leave_out_collectives()
  atexit.register(programs.close)
  return programs


# A longer test is listed at the end of a session. Make it smaller, let it share
# a run with other tests, or mark it slow.
MAX_SECONDS = 10
# A worker that has grown by more at the end of a file forgets its programs.
MAX_GROWTH_BYTES = 1.5e9
_HELPERS = 'tests.helpers'
MAX_MAPS = 15_000  # several per compiled program
_resident_before = 0.0  # bytes, when programs were last forgotten
_SECONDS: dict[str, float] = collections.defaultdict(float)
_TOO_LONG: list[str] = []
_CACHE_KEY = 'two_lives/seconds_of_files'

PROGRAMS = _set_environment()
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _same_seeds_in_each_run(request):
  """Numbers the seeds of requests without one, so that a failure comes again.

  Processes that a test starts draw random seeds.
  """
  base = zlib.crc32(request.node.nodeid.encode())
  numbers = itertools.count()

  def new_seed() -> int:
    return settings_lib.folded_seed(base, next(numbers))

  # Not by the fixture `monkeypatch`: asked for here, it would end after the
  # other fixtures of a test, and they would see what the test has changed.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(settings_lib, 'new_seed', new_seed)
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
  """Shares compiled programs with the other workers, test by test."""
  PROGRAMS.adopt()
  try:
    return (yield)
  finally:
    PROGRAMS.publish()
    if nextitem is None or _file(nextitem.nodeid) != _file(item.nodeid):
      _forget_programs(item.module)


def _forget_programs(module) -> None:
  """Frees programs and engines at the end of a file, if they have become many.

  Otherwise a worker would hold 10 GB at the end of all tests, and tens of
  thousands of memory maps: Linux ends a process that needs more than 65,530.
  """
  global _resident_before
  has_grown = _resident_bytes() - _resident_before >= MAX_GROWTH_BYTES
  if not has_grown and _num_maps() < MAX_MAPS:
    return
  import jax  # the environment was set before

  # Caches of helpers, too: they hold engines that several files share.
  helpers = [m for name, m in sys.modules.items() if name.startswith(_HELPERS)]
  for owner in (module, *helpers):
    for value in list(vars(owner).values()):
      if hasattr(value, 'cache_clear') and value.__module__ == owner.__name__:
        value.cache_clear()
  jax.clear_caches()
  gc.collect()
  _trim()
  # What is still held, by fixtures or in pieces.
  _resident_before = _resident_bytes()


def _trim() -> None:
  """Gives freed memory back, which malloc would keep: two workers share it."""
  with contextlib.suppress(OSError, AttributeError):  # other C libraries
    ctypes.CDLL(None).malloc_trim(0)


def _num_maps() -> int:
  """Returns the number of memory maps of this process; 0: unknown."""
  try:
    return pathlib.Path('/proc/self/maps').read_bytes().count(b'\n')
  except OSError:
    return 0


def _resident_bytes() -> float:
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return float('inf')  # another system than Linux: forget at every file
  return pages * os.sysconf('SC_PAGE_SIZE')


# First: pytest leaves out what -m does not name when it is asked in turn.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Marks further cases; puts files first that took longest before.

  So no worker ends long after the others.
  """
  tiers.mark_further_cases(items)
  seconds = _seconds_before(config)
  items.sort(key=lambda item: -seconds.get(_file(item.nodeid), 0.0))


def pytest_collection_finish():
  """Makes the garbage collector run seldom, and on new objects only.

  Tracing allocates so much that Python's defaults (700, 10, 10) walk all of
  JAX's caches again and again: 15 % of a warm run of
  tests/training/runs/test_metamorphic.py.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 10, 20)


def pytest_runtest_logreport(report):
  """Adds up the time of each file, setup and teardown included."""
  _SECONDS[_file(report.nodeid)] += report.duration
  if report.duration > MAX_SECONDS:
    _TOO_LONG.append(f'{report.duration:6.1f} s {report.when} {report.nodeid}')


def pytest_terminal_summary(terminalreporter):
  """Lists tests over the time budget; a busy machine must not fail them."""
  if _TOO_LONG:
    terminalreporter.section(f'tests over their budget of {MAX_SECONDS} s')
    terminalreporter.write_line('\n'.join(sorted(_TOO_LONG, reverse=True)))


def pytest_sessionfinish(session):
  """Remembers times of files; removes programs not used for weeks."""
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    compiled_programs.prune(compiled_programs.default_store())
    if cache := getattr(session.config, 'cache', None):
      before = _seconds_before(session.config)
      # The longest, since a session may run a few tests of a file.
      longest = {f: max(s, before.get(f, 0.0)) for f, s in _SECONDS.items()}
      cache.set(_CACHE_KEY, before | longest)


def _file(nodeid: str) -> str:
  return nodeid.partition('::')[0]


def _seconds_before(config) -> dict[str, float]:
  """Returns the time of each file in earlier sessions of this checkout."""
  cache = getattr(config, 'cache', None)  # absent with -p no:cacheprovider
  return cache.get(_CACHE_KEY, {}) if cache else {}
