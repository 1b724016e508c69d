"""Life one: trains a model from an experiment and freezes it.

    python train.py --config=experiments/quickstart.py --workdir=runs/quickstart
    python train.py --config=experiments/shakespeare_char.py:gpu \
      --workdir=runs/gpu --config.optimizer.peak_lr=3e-4

The same command resumes the run, and does nothing once it is complete.
What a run will take, before it starts, here or on devices that are not here:

    python train.py --config=experiments/pretrain.py:8b --plan
    python train.py --config=experiments/pretrain.py:8b --plan=v5p:4x4x4

On several hosts, or several times on one, start it once per process; the
workdir is on a file system that they share:

    python train.py --config=... --workdir=... \
      --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0  # then 1

Under Slurm, Open MPI, torchrun, an Indexed Job of Kubernetes and on TPU pods
the three flags are not needed: parallel/processes.py says what is read instead.
A run may go on with any other number of processes.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from parallel import targets
from training import config_flags as training_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  help_string='File in experiments/, with an optional :variant; any of its'
  ' fields can be set, as in --config.optimizer.peak_lr=1e-3.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run is written, and resumed from.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'Of several processes: host:port of the first; auto asks jax to find it.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', -1, 'How many processes there are; -1: see --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', -1, 'Which of them this is, from 0; -1: see --coordinator.'
)
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
  'heartbeat_timeout_s',
  60,
  'Seconds of silence after which a process is dead, and ends the others.',
)
_PLAN = flags.DEFINE_string(
  'plan',
  None,
  'Print what the run takes and leave; of devices that are not here, as in'
  ' v5p:4x4x4, v5e:2x4 or h100:8, by compiling the step for them.',
)
_PLAN_MFU = flags.DEFINE_float(
  'plan_mfu', 0.4, 'Share of the peak FLOP/s that --plan takes for granted.'
)
_PRICE_PER_DEVICE_HOUR = flags.DEFINE_float(
  'price_per_device_hour', 0.0, 'What --plan counts a device-hour as.'
)


def main(argv: list[str]) -> int:
  """Runs what the flags say; errors of the user's are one line."""
  if len(argv) > 1:
    raise app.UsageError(
      f'got arguments {argv[1:]}, expected flags only, each with its value'
      ' behind a = sign, as in --plan=v5e:2x4'
    )
  if _CONFIG.value is not None and _PLAN.value is not None:
    return _plan(_PLAN.value)
  if _PLAN.value is not None:
    raise app.UsageError(
      'got --plan without --config, expected both, as in --config='
      'experiments/quickstart.py --plan'
    )
  if _CONFIG.value is None or not _WORKDIR.value:
    raise app.UsageError(
      'got no --config or no --workdir, expected both, as in --config='
      'experiments/quickstart.py --workdir=runs/quickstart'
    )
  # Orbax reports and warns at length about saves that went well.
  logging.set_verbosity(logging.ERROR)
  # Not at the top: --help and a mistyped flag should not wait for jax.
  import rich.console

  from parallel import host_memory, processes
  from training import loop, run

  host_memory.reuse_freed_memory()
  _join_processes()
  try:
    result = run.run(
      _CONFIG.value,
      pathlib.Path(_WORKDIR.value),
      rich.console.Console(soft_wrap=True, quiet=not processes.is_first()),
    )
  except (
    ValueError,
    FileNotFoundError,
    loop.NonFiniteError,
    processes.PeerError,
  ) as error:
    sys.exit(f'{_who()}error: {error}')
  return result.exit_code


def _plan(target: str) -> int:
  """Prints what the run would take."""
  from training import fit, plan

  try:
    made = fit.make(
      _CONFIG.value,
      target,
      assumed_mfu=_PLAN_MFU.value,
      price_per_device_hour=_PRICE_PER_DEVICE_HOUR.value,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  print(plan.report(made))
  return 0


def _join_processes() -> None:
  """Becomes one of several processes, if flags or environment say so."""
  from parallel import processes

  try:
    processes.start(
      processes.detect(
        os.environ,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
      ),
      heartbeat_timeout_s=_HEARTBEAT_TIMEOUT_S.value,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')


def _who() -> str:
  """Says which of several processes speaks."""
  from parallel import processes

  return f'process {processes.index()}: ' if processes.count() > 1 else ''


def _parse_flags(argv: list[str]) -> list[str]:
  argv = targets.with_default(argv)
  # The file of an experiment imports jax, which reads its environment once.
  targets.prepare_for(targets.value_in(argv))
  try:
    return training_flags.parse(argv)
  except training_flags.FlagError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
