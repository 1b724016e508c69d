"""The loss of a run that was killed, over that of one that was not."""

from collections.abc import Sequence
import pathlib

from studies.common import figure


def write(
  path: pathlib.Path,
  whole: Sequence[dict],
  killed: Sequence[dict],
  kill_steps: Sequence[int],
) -> None:
  """Draws the figure, whose title says whether the two are the same.

  Args:
    path: of the SVG file.
    whole: `train` records of the uninterrupted run.
    killed: of the other one.
    kill_steps: the last step before each kill.
  """
  curves = [
    [(record['step'], record['loss']) for record in records]
    for records in (whole, killed)
  ]
  lowest = min(loss for curve in curves for _, loss in curve)
  lines = [
    figure.Line(
      x=[step for step, _ in curve],
      y=[loss for _, loss in curve],
      width=width,
    )
    for curve, width in zip(curves, (6.0, 1.0), strict=True)
  ]
  kills = figure.Line(
    x=list(kill_steps), y=[lowest] * len(kill_steps), style='|'
  )
  is_same = 'all' if curves[0] == curves[1] else 'NOT'
  path.parent.mkdir(parents=True, exist_ok=True)
  panel = figure.Panel(
    title=f'{len(killed)} losses, {is_same} equal to the bit',
    x_label='step',
    y_label='nats per token',
    lines={
      'uninterrupted': lines[0],
      f'killed {len(kill_steps)} times': lines[1],
      'last step before each': kills,
    },
  )
  figure.save(path, [panel])
