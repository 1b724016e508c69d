"""Fits the scaling law to points from a file, with intervals.

    python -m studies.scaling.fit --points=points.csv
    python -m studies.scaling.fit --points=chinchilla_points.csv \
      --drop_highest=5 --against=besiroglu,hoffmann

The second command repeats the refit of Besiroglu et al. (arXiv:2404.10102) from
the points that they published
(https://github.com/epoch-research/analyzing-chinchilla): like them it leaves
out the five models of highest loss. Points that belong to budgets (a column
`flops` with few values) are also analysed by parabolas, and the largest budget
is predicted from the others.
"""

from absl import app, flags

from checks import expect, path_flags
from studies.common import figure
from studies.scaling import (
  optimum,
  parabolas,
  parametric,
  points as points_lib,
  report,
)


def analyse(
  points: points_lib.Points, num_resamples: int, against: list[str]
) -> None:
  """Prints fits, misfits, parabolas and the held-out prediction.

  Raises:
    NoFitError: no method has a fit, or a budget has no parabola.
  """
  found, failed = report.estimates(points, num_resamples)
  if not found:
    raise parametric.NoFitError('; '.join(failed.values()))
  print(report.fits_table(found))
  for name, words in failed.items():
    print(f'no fit by {name}: {words}')
  laws = {name: estimate.fit for name, estimate in found.items()}
  first = next(iter(laws.values()))
  laws |= {name: optimum.parse_law(name) for name in against}
  print(report.misfit_table(points, laws))
  if has_budgets(points):
    print(report.isoflop_table(points, first, num_resamples))
    print(report.held_out_lines(points))


def has_budgets(points: points_lib.Points) -> bool:
  """Returns whether models share budgets, so that parabolas can be drawn."""
  return len(points.budgets) * parabolas.LEAST_SIZES <= len(points)


def draw(path: str, points: points_lib.Points) -> None:
  """Draws the fit, and the parabolas of points that belong to budgets."""
  try:
    law = parametric.project(points)
  except parametric.NoFitError:
    law = parametric.huber(points)
  panels = report.fit_panels(points, law)
  if has_budgets(points):
    panels = [*report.isoflop_panels(points, law), *panels]
  figure.save(path, panels, share_y=False)


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'points',
    None,
    'A CSV file with the columns params, tokens, loss and perhaps flops.',
    required=True,
  )
  flags.DEFINE_integer(
    'drop_highest', 0, 'Models of highest loss to leave out.', lower_bound=0
  )
  flags.DEFINE_integer('resamples', 200, 'Bootstrap resamples.', lower_bound=2)
  flags.DEFINE_list(
    'against', [], f'Published laws to compare: {", ".join(optimum.LAWS)}.'
  )
  path_flags.DEFINE_path('figure', '', 'A .svg or .png file; none if empty.')


def main(argv: list[str]) -> int:
  """Fits the points of a file and prints the tables."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  values = flags.FLAGS
  try:
    for name in values.against:
      expect.one_of('--against', name, optimum.LAWS)
    points = points_lib.read(values.points)
    points = points_lib.without_highest(points, values.drop_highest)
    print(f'{len(points)} models, {len(points.budgets)} budgets')
    analyse(points, values.resamples, values.against)
    if values.figure:
      draw(values.figure, points)
  except ValueError as error:
    print(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  # Not at import: other commands have flags of these names.
  _define_flags()
  app.run(main)
