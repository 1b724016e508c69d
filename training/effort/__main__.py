"""Fits a router's predictor to logged outcomes.

    python -m training.effort --outcomes=runs/routing/outcomes.jsonl \
      --model=runs/think/small_0/frozen --out=runs/routing/effort.json

`training/effort/outcomes.py` defines a line; `python -m studies.routing` writes
such a file. The questions are split by a hash of their ids: 60 % train, 20 %
calibrate, 20 % test. It prints the expected calibration error of each effort on
the test questions, with its standard error.
`inference/search/routing/router.py` serves the file beside the same model.
"""

import sys

from absl import app, flags
import numpy as np

from checks import path_flags
from evals.results import calibration, statistics
from frozen import effort_predictor, format as frozen_format
from training.effort import fit as fit_lib, outcomes


def rows(
  predictor: effort_predictor.Predictor, table: outcomes.Outcomes
) -> list[str]:
  """Returns a line about the calibration of each effort on some questions."""
  probs_BE, _ = predictor(table.features_BF)
  found = []
  for e, effort in enumerate(table.efforts):
    values = calibration.error_values(probs_BE[:, e], table.correct_BE[:, e])
    found.append(
      f'{effort}: right {table.correct_BE[:, e].mean():.3f}, predicted'
      f' {probs_BE[:, e].mean():.3f}, ECE {np.mean(values):.3f} +-'
      f' {statistics.standard_error(values):.3f}'
    )
  return found


def main(argv: list[str]) -> None:
  """Fits, writes and measures; errors are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  values = flags.FLAGS
  try:
    config = fit_lib.FitConfig(
      num_hidden=values.num_hidden,
      num_steps=values.num_steps,
      calibration=values.calibration,
      seed=values.seed,
    )
    table = outcomes.read(values.outcomes)
    digest = ''
    if values.model:
      manifest = frozen_format.open_directory(values.model).manifest
      digest = manifest.weights_digest
    test = table.split('test')
    found = fit_lib.fit(
      table.split('train'), table.split('calibration'), config
    )
    predictor = effort_predictor.Predictor(
      params=found.params,
      efforts=found.efforts,
      weights_digest=digest,
      pooling=values.pooling,
    )
    effort_predictor.save(values.out, predictor)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(
    f'{len(table)} questions; best step {found.best_step} of'
    f' {config.num_steps}, loss {found.train_loss:.4f}, held out'
    f' {found.stop_loss:.4f}'
  )
  print('\n'.join(rows(predictor, test)))
  print(f'wrote {values.out}')


if __name__ == '__main__':
  _defaults = fit_lib.FitConfig()
  path_flags.DEFINE_path(
    'outcomes', None, 'JSON Lines of logged outcomes.', required=True
  )
  path_flags.DEFINE_path('out', None, 'JSON file to write.', required=True)
  path_flags.DEFINE_path(
    'model',
    '',
    'Frozen directory of the model whose features were logged. A server refuses'
    ' the predictor for other weights. Empty: it accepts any weights.',
  )
  flags.DEFINE_integer(
    'num_hidden',
    _defaults.num_hidden,
    'Hidden units of the predictor. Lower it for few questions.',
    1,
  )
  flags.DEFINE_integer(
    'num_steps',
    _defaults.num_steps,
    'Steps of the fit; the weights of the best step are kept.',
    1,
  )
  flags.DEFINE_enum(
    'calibration',
    _defaults.calibration,
    fit_lib.KINDS,
    'Calibration of each effort: platt fits a line in the logits, temperature'
    ' its slope only, none nothing. Take a simpler one for few questions.',
  )
  flags.DEFINE_enum(
    'pooling',
    'last',
    ('last', 'mean'),
    'Pooling of the hidden states in the logged features: the last token or the'
    ' mean. Give the value with which they were logged.',
  )
  flags.DEFINE_integer('seed', _defaults.seed, 'Seed of the first weights.', 0)
  app.run(main)
