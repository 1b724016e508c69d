"""Life one: trains a model from an experiment and freezes it.

    python train.py --config=experiments/quickstart.py --workdir=runs/quickstart
    python train.py --config=experiments/shakespeare_char.py:gpu \
      --workdir=runs/gpu --config.optimizer.peak_lr=3e-4

The same command resumes the run, and does nothing once it is complete.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from training import config_flags as training_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  help_string='File in experiments/, with an optional :variant; any of its'
  ' fields can be set, as in --config.optimizer.peak_lr=1e-3.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run is written, and resumed from.'
)


def main(argv: list[str]) -> int:
  """Runs what the flags say; errors of the user's are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  if _CONFIG.value is None or not _WORKDIR.value:
    raise app.UsageError(
      'got no --config or no --workdir, expected both, as in --config='
      'experiments/quickstart.py --workdir=runs/quickstart'
    )
  # Orbax reports and warns at length about saves that went well.
  logging.set_verbosity(logging.ERROR)
  # Not at the top: --help and a mistyped flag should not wait for jax.
  import rich.console

  from parallel import host_memory
  from training import loop, run

  host_memory.reuse_freed_memory()
  try:
    result = run.run(
      _CONFIG.value,
      pathlib.Path(_WORKDIR.value),
      rich.console.Console(soft_wrap=True),
    )
  except (ValueError, FileNotFoundError, loop.NonFiniteError) as error:
    sys.exit(f'error: {error}')
  return result.exit_code


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return training_flags.parse(argv)
  except training_flags.FlagError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
