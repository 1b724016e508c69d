"""What the short suites of CI and the full one of `make survive` share.

Each function tries something a number of times, and returns a `Tally`.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import pathlib
import random

from tests.survival import damage, full_disk, kills as kills_lib, process, tiny

Tell = Callable[[str], None]


@dataclasses.dataclass(kw_only=True)
class Tally:
  """How often something was tried, and what went wrong."""

  what: str
  tried: int
  failures: list[str] = dataclasses.field(default_factory=list)
  skipped: str = ''  # why nothing was tried
  detail: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arena:
  """Where the suites run: a corpus, a cache, and a run that nobody touched."""

  directory: pathlib.Path
  corpus: str
  seed: int = 0

  @property
  def whole(self) -> pathlib.Path:
    """The workdir of the uninterrupted run."""
    return self.directory / 'whole'

  def start(self, workdir: pathlib.Path, *flags: str, **options):
    """Starts, or goes on with, a run."""
    return process.start(
      self.corpus, workdir, self.directory / 'cache', *flags, **options
    )

  def rng(self, what: str) -> random.Random:
    """Returns the source of the random moments and places of one suite."""
    return random.Random(f'{self.seed} {what}')


def prepare(directory: pathlib.Path, *, seed: int = 0) -> Arena:
  """Makes an arena: runs the experiment once, uninterrupted."""
  arena = Arena(
    directory=directory,
    corpus=process.write_corpus(directory / 'corpus'),
    seed=seed,
  )
  process.run(arena.corpus, arena.whole, directory / 'cache')
  steps = [r['step'] for r in process.records(arena.whole) if 'tokens' in r]
  assert steps == list(range(1, tiny.NUM_STEPS + 1)), steps
  return arena


def kill(arena: Arena, count: int, tell: Tell = lambda text: None) -> Tally:
  """Kills one run so often, and compares what becomes of it."""
  workdir = arena.directory / 'killed'
  rng = arena.rng('kill')
  start = functools.partial(arena.start, workdir)
  done = kills_lib.run_killed(
    start, workdir, kills_lib.plan(count, rng), rng, tell
  )
  hits = collections.Counter(kill.hit for kill in done)
  tally = Tally(
    what='SIGKILL, then a new process',
    tried=len(done),
    detail=', '.join(f'{phase} {num}' for phase, num in sorted(hits.items())),
  )
  code, output = process.finish(start())
  if code:
    tally.failures.append(f'exit code {code}: {output}')
  else:
    tally.failures += process.differences(workdir, arena.whole)
  return tally


def damage_checkpoints(arena: Arena, what: str, count: int) -> Tally:
  """Damages the newest checkpoint so often, in one of `damage.KINDS`."""
  rng = arena.rng(what)
  tally = Tally(what=f'{what} of a checkpoint', tried=count)
  for _ in range(count):
    tally.failures += damage.try_damage(arena.whole, damage.KINDS[what], rng)
  return tally


def damage_all(arena: Arena, count: int) -> Tally:
  """Damages all checkpoints so often: refused, and nothing is changed."""
  rng = arena.rng('all')
  tally = Tally(what='all checkpoints damaged: refused', tried=count)
  for _ in range(count):
    tally.failures += damage.try_all_damaged(arena.whole, rng)
  return tally


def fall_back(arena: Arena, count: int) -> Tally:
  """Stops a run by SIGTERM, flips a bit of what it saved, and lets it go on."""
  tally = Tally(what='SIGTERM, a flip, on from the one before', tried=count)
  rng = arena.rng('fall back')
  for i in range(count):
    workdir = arena.directory / f'flipped-{i}'
    step = process.stop(
      arena.start(workdir), workdir, 2 * tiny.SAVE_EVERY + rng.randrange(20)
    )
    path = damage.flip(workdir / 'checkpoints' / str(step), rng)
    code, output = process.finish(arena.start(workdir))
    place = workdir / 'checkpoints' / f'damaged-{step}-0'
    if code or str(path) not in output or not place.is_dir():
      tally.failures.append(f'exit code {code}: {output}')
      continue
    place.rename(arena.directory / f'aside-{i}')
    tally.failures += process.differences(workdir, arena.whole)
  return tally


def refuse(arena: Arena) -> Tally:
  """Starts other experiments in the workdir: an error, and nothing changed."""
  flags = (
    '--config.seed=7',
    '--config.name=other',
    '--config.model.mlp_width=48',
  )
  tally = Tally(what='workdir of another experiment', tried=len(flags))
  before = damage.tree_digest(arena.whole)
  for flag in flags:
    code, output = process.finish(arena.start(arena.whole, flag))
    field = flag.removeprefix('--config.').split('=')[0]
    field = field.replace('name', 'experiment')
    if code != 1 or f'holds another run: got {field} = ' not in output:
      tally.failures.append(f'{flag}: exit code {code}: {output}')
    if damage.tree_digest(arena.whole) != before:
      tally.failures.append(f'{flag}: something was changed')
  return tally


def fill_disk(arena: Arena, *, is_short: bool) -> list[Tally]:
  """Saves onto disks that are full, and later are not."""
  large = Tally(what='no room for a save, later there is (EFBIG)', tried=1)
  large.failures += full_disk.try_large_files(
    arena.start, arena.directory / 'large', arena.whole
  )
  if is_short:
    return [large]
  last = Tally(what='no room to the end (EFBIG): error', tried=1)
  last.failures += full_disk.try_last_save(
    arena.start, arena.directory / 'last', arena.whole
  )
  full = Tally(what='no room for anything, later there is (ENOSPC)', tried=1)
  with full_disk.tmpfs(arena.directory / 'disk') as disk:
    if disk is None:
      full.tried, full.skipped = 0, 'mounting a tmpfs is not permitted here'
    else:
      full.failures += full_disk.try_full(arena.start, disk, arena.whole)
  return [large, last, full]


def table(tallies: list[Tally]) -> str:
  """Returns the tallies as text."""
  width = max(len(tally.what) for tally in tallies)
  lines = [f'{"":<{width}}  tried  passed  failed']
  for tally in tallies:
    failed = min(len(tally.failures), tally.tried)
    words = tally.skipped and f'skipped: {tally.skipped}' or tally.detail
    lines.append(
      f'{tally.what:<{width}}  {tally.tried:5}  {tally.tried - failed:6}'
      f'  {failed:6}  {words}'.rstrip()
    )
  return '\n'.join(lines)
