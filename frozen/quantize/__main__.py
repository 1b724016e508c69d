"""Stores the kernels of a frozen directory in fewer bits.

    python -m frozen.quantize --source=FROZEN --out=DIR --scheme=int4 \
      --method=gptq --text=FILE

--scheme names the number format, and --method the way to choose the numbers.
Every method is measured on the end of the text, and the quality table is
written beside the weights, as quality.json.
"""

import sys

from absl import app, flags, logging

from checks import path_flags
from frozen.quantize import calibration, quality, quantizing
from models.linear.stored import round as rounding


def main(argv: list[str]) -> None:
  """Quantises the directory that the flags name."""
  if len(argv) != 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags alone')
  logging.set_verbosity(logging.ERROR)  # orbax logs every step that it takes
  values = flags.FLAGS
  try:
    manifest, report = quantizing.quantise_directory(
      values.source,
      values.out,
      scheme=values.scheme,
      method=values.method,
      text=calibration.Config(
        path=values.text,
        seed=values.seed,
        rows=values.rows,
        length=values.length,
        held_out=values.held_out,
      ),
      rotate=values.rotate,
      overwrite=values.overwrite,
      tell=print,
    )
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'frozen: {values.out}')
  print(f'quality {quality.text(report["quality"])}')
  print(f'weights {manifest.weights_digest}')


def _define_flags() -> None:
  text = calibration.Config()
  path_flags.DEFINE_path(
    'source', None, 'Frozen directory to quantise, in floats.'
  )
  path_flags.DEFINE_path('out', None, 'Directory to write.')
  flags.DEFINE_string(
    'scheme', 'int4', f'Number format: one of {", ".join(rounding.SCHEMES)}.'
  )
  flags.DEFINE_string(
    'method',
    'gptq',
    f'Way to choose the numbers: one of {", ".join(quantizing.METHODS)}. rtn'
    ' only rounds; the others calibrate on the text, each expert of a mixture'
    ' on its own tokens: give more --rows if many experts are only rounded.',
  )
  path_flags.DEFINE_path(
    'text',
    text.path,
    'Text in UTF-8. Its last tenth measures the result, the rest calibrates;'
    f' default {calibration.SAMPLE}, which is part of Python.',
  )
  flags.DEFINE_integer('seed', text.seed, 'Seed that draws the rows of text.')
  flags.DEFINE_integer(
    'rows',
    text.rows,
    'Rows of text to calibrate with. More rows take longer.',
  )
  flags.DEFINE_integer('length', text.length, 'Tokens of each row of text.')
  flags.DEFINE_integer(
    'held_out',
    text.held_out,
    'Rows of text to measure with, at least 2. More rows lower the errors of'
    ' the quality table.',
  )
  flags.DEFINE_bool(
    'rotate',
    False,
    'Turn the residual stream and the values by random orthogonal matrices'
    ' first: large channels are spread over all. The function stays, and a tied'
    ' head becomes a table of its own, which takes more memory.',
  )
  flags.DEFINE_bool('overwrite', False, 'Replace a frozen directory at --out.')
  flags.mark_flags_as_required(['source', 'out'])


if __name__ == '__main__':
  _define_flags()
  app.run(main)
