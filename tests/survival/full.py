"""Every survival suite in full, with a tally; `make survive`.

    python -m tests.survival.full --kills=20 --flips=200

Takes some minutes. A shorter form of the same is among the slow tests.
"""

from collections.abc import Sequence
import json
import pathlib
import sys
import tempfile
import time

from absl import app, flags, logging

from tests.survival import figure, process, suite

_KILLS = flags.DEFINE_integer('kills', 20, 'Kills of one run.', lower_bound=1)
_FLIPS = flags.DEFINE_integer('flips', 200, 'Bits to flip.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of moments and places.')
_FIGURE = flags.DEFINE_string('figure', '', 'SVG file of the losses to write.')


def _curves(arena: suite.Arena, steps: Sequence[int]) -> None:
  """Writes the figure of the run that was killed."""
  curves = [
    [r for r in process.records(workdir) if r['kind'] == 'train']
    for workdir in (arena.whole, arena.directory / 'killed')
  ]
  figure.write(pathlib.Path(_FIGURE.value), curves[0], curves[1], steps)


def main(argv: Sequence[str]) -> int:
  """Runs the suites; returns 1 if anything failed."""
  del argv
  logging.set_verbosity(logging.ERROR)
  began = time.monotonic()
  kill_steps = []

  def tell(text: str) -> None:
    kill_steps.append(int(text.partition('step=')[2].rstrip(')')))
    print(text, flush=True)

  with tempfile.TemporaryDirectory() as directory:
    arena = suite.prepare(pathlib.Path(directory), seed=_SEED.value)
    tallies = [suite.kill(arena, _KILLS.value, tell)]
    if _FIGURE.value:
      _curves(arena, kill_steps)
    for what, count in (
      ('bit flips', _FLIPS.value),
      ('truncations', _FLIPS.value // 4),
      ('half deletions', _FLIPS.value // 4),
      ('added files', _FLIPS.value // 20),
    ):
      tallies.append(suite.damage_checkpoints(arena, what, max(count, 1)))
    tallies.append(suite.damage_all(arena, max(_FLIPS.value // 20, 1)))
    tallies.append(suite.fall_back(arena, 1))
    tallies.append(suite.refuse(arena))
    tallies += suite.fill_disk(arena, is_short=False)
  print(suite.table(tallies))
  failures = [text for tally in tallies for text in tally.failures]
  for text in failures:
    print(f'failed: {json.dumps(text)[:2000]}', file=sys.stderr)
  print(f'{time.monotonic() - began:.0f} s')
  return 1 if failures else 0


if __name__ == '__main__':
  app.run(main)
