"""SIGKILL at chosen kinds of moments of one run, until it is complete.

A kill waits for a phase, then for a random moment more: what was really hit is
read from what the dead process left behind.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
import random
import re
import time

from storage import file_names
from tests.survival import process, tiny

PHASES = ('start', 'steps', 'evaluation', 'saving', 'sealing', 'freeze')
_POLL_S = 0.0005
# Longest random waits in a phase, about as long as it lasts.
_LONGEST_S = {
  'start': 6.0,
  'steps': 0.1,
  'evaluation': 0.1,
  'saving': 0.15,
  'sealing': 0.01,
  'freeze': 0.04,
}


Unfinished = Mapping[pathlib.Path, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
  """One kill: what was aimed at, and what was hit."""

  aimed: str
  hit: str  # one of PHASES, or 'end' if it came too late
  step: int  # the last one in the metrics


def plan(count: int, rng: random.Random) -> list[tuple[str, int]]:
  """Returns (phase, step from which on) of `count` kills, in their order."""
  num_freezes = max(1, count // 7)
  others = [phase for phase in PHASES if phase != 'freeze']
  rng.shuffle(others)
  if count <= len(PHASES):
    # A short suite: the phases that leave something half done.
    others = ['saving', 'evaluation', 'sealing', 'steps', 'start']
  phases = [others[i % len(others)] for i in range(count - num_freezes)]
  steps = sorted(
    rng.randrange(0, tiny.NUM_STEPS - tiny.SAVE_EVERY) for _ in phases
  )
  kills = list(zip(phases, steps, strict=True))
  return kills + [('freeze', tiny.NUM_STEPS)] * num_freezes


def run_killed(
  start: Callable[[], process.subprocess.Popen],
  workdir: pathlib.Path,
  kills: Sequence[tuple[str, int]],
  rng: random.Random,
  tell: Callable[[str], None] = lambda text: None,
) -> list[Kill]:
  """Kills a run as planned; the caller finishes it.

  Args:
    start: starts a process of the run, or goes on with it.
    workdir: of the run.
    kills: of `plan`.
    rng: of the moments.
    tell: is told of each kill.
  """
  done = []
  for phase, from_step in kills:
    stale = _unfinished(workdir)
    running = start()
    wait = rng.uniform(0, _LONGEST_S[phase])
    has_begun, last = False, _size(workdir)
    while process.is_alive(running):
      # Opening the file may replace it by a shorter one; steps make it grow.
      now = _size(workdir)
      has_begun |= now[0] == last[0] and now[1] > last[1]
      last = now
      if (has_begun or phase in ('start', 'freeze')) and _is_in(
        workdir, phase, from_step, stale
      ):
        break
      time.sleep(_POLL_S)
    time.sleep(wait)
    was_alive = process.is_alive(running)
    output = process.kill(running)
    if not was_alive and running.returncode:
      raise AssertionError(f'died by itself of {running.returncode}: {output}')
    hit = _hit(workdir, stale, output) if was_alive else 'end'
    done.append(Kill(aimed=phase, hit=hit, step=_last_step(workdir)))
    tell(f'kill {len(done)}/{len(kills)}: {done[-1]}')
  return done


def _size(workdir: pathlib.Path) -> tuple[int, int]:
  """Returns which file the metrics are, and how long it is."""
  try:
    stat = (workdir / 'metrics.jsonl').stat()
  except FileNotFoundError:
    return 0, 0
  return stat.st_ino, stat.st_size


def _last_step(workdir: pathlib.Path) -> int:
  records = process.tail(workdir / 'metrics.jsonl')
  return max((r['step'] for r in records if r['kind'] == 'train'), default=0)


def _unfinished(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
  """Returns what is half done, and when it was changed.

  What an earlier kill has left stays as it was until it is removed.
  """
  found = {}
  root = workdir / file_names.CHECKPOINTS
  for path in (
    *root.glob(f'*{file_names.PARTIAL}'),
    *root.glob(f'*{file_names.DELETED}'),
    *workdir.glob('.frozen.*'),
  ):
    with contextlib.suppress(FileNotFoundError):
      found[path] = path.stat().st_mtime_ns
  return found


def _new(workdir: pathlib.Path, stale: Unfinished) -> list[pathlib.Path]:
  return [
    path
    for path, changed in _unfinished(workdir).items()
    if stale.get(path) != changed
  ]


def _is_in(
  workdir: pathlib.Path, phase: str, from_step: int, stale: Unfinished
) -> bool:
  """Whether a running process has come to a phase."""
  if phase == 'start':
    return True
  if phase == 'freeze':
    return any(
      '.partial-' in path.name and path not in stale
      for path in _unfinished(workdir)
    )
  if phase in ('saving', 'sealing'):
    return any(
      path.suffix == file_names.PARTIAL
      and int(path.stem) >= from_step
      and (phase == 'saving' or any(path.glob('seal.*')))
      for path in _new(workdir, stale)
    )
  step = _last_step(workdir)
  if step < from_step:
    return False
  return phase == 'steps' or _is_evaluating(workdir)


def _is_evaluating(workdir: pathlib.Path) -> bool:
  """Whether the last step has its evaluation before it."""
  records = [
    r
    for r in process.tail(workdir / 'metrics.jsonl')
    if r['kind'] in ('train', 'eval')
  ]
  return (
    bool(records)
    and records[-1]['kind'] == 'train'
    and records[-1]['step'] % tiny.EVAL_EVERY == 0
  )


def _hit(workdir: pathlib.Path, stale: Unfinished, output: str) -> str:
  """Returns the phase that a process died in, from what it left."""
  new = _new(workdir, stale)
  if any(path.name.startswith('.frozen') for path in new):
    return 'freeze'
  if (workdir / 'frozen').exists():
    return 'end'
  if not re.search(r'^step \d+/', output, re.MULTILINE):
    return 'start'
  for path in new:
    # Deleting is the end of sealing.
    is_sealed = path.suffix == file_names.DELETED or any(path.glob('seal.*'))
    return 'sealing' if is_sealed else 'saving'
  return 'evaluation' if _is_evaluating(workdir) else 'steps'
