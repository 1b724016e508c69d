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

With --max_restarts=3 it is started again when it crashes, or when another of
its processes does, up to so often without a new checkpoint in between:
training/lifecycle/supervisor.py. What it exits with is listed in
training/lifecycle/exit_codes.py: 0 complete, 1 yours to change, 3 a loss that
is not finite, 4 the same step crashed again, 143 or 130 stopped by SIGTERM or
Ctrl-C and saved; any from 64 up is worth starting again.
"""

import os
import pathlib
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from hardware import targets
from storage import disk, locks
from training import flags as flags_lib
from training.lifecycle import exit_codes, supervisor

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
_MAX_RESTARTS = flags.DEFINE_integer(
  'max_restarts',
  0,
  'How often a run that crashes is started again, by a parent of its own,'
  ' without a new checkpoint in between.',
  lower_bound=0,
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
  # Orbax reports and warns at length about saves that went well,
  logging.set_verbosity(logging.ERROR)
  # Not at the top: --help and a mistyped flag should not wait for jax.
  import rich.console

  from hardware import host_memory
  from parallel import processes
  from training import run
  from training.reporting import goodput, library_logs, reporter

  library_logs.quiet()  # and about those that failed
  host_memory.reuse_freed_memory()
  _join_processes()
  try:
    result = run.run(
      _CONFIG.value,
      pathlib.Path(_WORKDIR.value),
      rich.console.Console(soft_wrap=True, quiet=not processes.is_first()),
      seconds_before=goodput.process_age(),
    )
  except (ValueError, FileNotFoundError) as error:
    return _failed(error, exit_codes.USER_ERROR)
  except reporter.NonFiniteError as error:
    return _failed(error, exit_codes.NON_FINITE)
  except (
    processes.PeerError,
    disk.SaveError,
    locks.InUseError,
  ) as error:
    return _failed(error, exit_codes.TRY_AGAIN)
  return result.exit_code


def _failed(error: Exception, code: int) -> int:
  """Tells of an error in one line, and by which of the processes."""
  print(f'{_who()}error: {error}', file=sys.stderr)
  return code


def _plan(target: str) -> int:
  """Prints what the run would take."""
  from training.planning import plan, remedy

  try:
    made = remedy.make(
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
    return flags_lib.parse(argv)
  except flags_lib.FlagError as error:
    sys.exit(f'error: {error}')


def _supervisor(argv: list[str]) -> supervisor.Supervisor | None:
  """Returns what runs the command line as a child, if that is asked for."""
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  flags.DEFINE_integer(_MAX_RESTARTS.name, 0, '', 0, flag_values=values)
  values.set_gnu_getopt()
  try:
    rest = values(argv, known_only=True)
  except flags.Error:
    return None  # to be told of by the parser of all flags
  if not values.max_restarts or not values.workdir:
    return None
  return supervisor.Supervisor(
    [sys.executable, *rest, f'--{_WORKDIR.name}={values.workdir}'],
    pathlib.Path(values.workdir),
    max_restarts=values.max_restarts,
  )


def _run() -> None:
  """Supervises or trains; exits with a code of `lifecycle/exit_codes.py`."""
  if supervising := _supervisor(sys.argv):
    sys.exit(supervising.run())
  supervisor.die_with_supervisor()
  try:
    app.run(main, flags_parser=_parse_flags)
  except Exception:
    # Python's own code for it is 1, which is for errors of the user's.
    traceback.print_exc()
    sys.exit(exit_codes.CRASHED)


if __name__ == '__main__':
  _run()
