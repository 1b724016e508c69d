"""Life one: trains a model from an experiment and freezes it.

    python train.py --config=experiments/quickstart.py --workdir=runs/quickstart
    python train.py --config=experiments/shakespeare_char.py:gpu \
      --workdir=runs/gpu --config.optimizer.peak_lr=3e-4

The same command resumes the run, and does nothing once it is complete.
To plan the time, memory and cost of a run before it starts, on these devices or
on others:

    python train.py --config=experiments/pretrain.py:8b --plan
    python train.py --config=experiments/pretrain.py:8b --plan=v5p:4x4x4

To see which tokens of its data a run trains, and check them:

    python train.py --config=experiments/sft.py --audit

To run several processes, on one host or on several, start the command once for
each process. The workdir must be on a file system that they share:

    python train.py --config=... --workdir=... \
      --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0  # then 1

Under Slurm, Open MPI, torchrun, an Indexed Job of Kubernetes and on TPU pods
the three flags are not needed: parallel/processes.py lists the variables that
are read instead. A run may resume with any other number of processes.

With --max_restarts=3 the run is started again when it crashes, or when another
of its processes crashes, at most three times without a new checkpoint in
between: training/lifecycle/supervisor.py.

training/lifecycle/exit_codes.py lists the exit codes: 0 complete, 1 the user
must change something, 3 a loss is not finite, 4 the same step crashed again,
143 or 130 stopped by SIGTERM or Ctrl-C and saved. For any code from 64 up, the
same command resumes the run.
"""

import os
import pathlib
import sys
import traceback
from typing import Any

from absl import app, flags, logging

from checks import path_flags
from hardware import compilation_cache, targets
from storage import disk, locks
from training import experiment_files, flags as flags_lib
from training.lifecycle import exit_codes, supervisor
from training.reporting import wandb_mirror

_CONFIG = flags_lib.define_config(
  'The experiment: a file in experiments/, with an optional'
  ' :variant; --config=list shows them. Flags set any field, as'
  ' --config.optimizer.peak_lr=1e-3.',
)
_WORKDIR = path_flags.DEFINE_path(
  'workdir',
  None,
  'Directory of the run. It is created, or the run in it is resumed.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'Address of the first of several processes, as host:port. auto: jax finds it.'
  ' Empty (default): read from the environment, or one process.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes',
  -1,
  'Number of processes of the run. -1 (default): as for --coordinator.',
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id',
  -1,
  'Index of this process, from 0. -1 (default): as for --coordinator.',
)
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
  'heartbeat_timeout_s',
  60,
  'Seconds without a heartbeat after which a process counts as dead, and the'
  ' other processes end. Raise it if slow hosts are taken for dead.',
)
_MAX_RESTARTS = flags.DEFINE_integer(
  'max_restarts',
  0,
  'How often a run that crashes is started again without a new checkpoint in'
  ' between. A parent process does it. 0 (default): never.',
  lower_bound=0,
)
_COMPILATION_CACHE = path_flags.DEFINE_path(
  'compilation_cache',
  None,
  f'{compilation_cache.HELP} --plan keeps none; a run of several processes only'
  ' in a directory that is given, which all of them must share.',
)
_WANDB = flags.DEFINE_string('wandb', '', wandb_mirror.HELP)
_AUDIT = flags.DEFINE_integer(
  'audit',
  0,
  'Print this many rows of each source (4 without a value) with the trained'
  ' tokens marked, check all documents, and exit.',
  lower_bound=0,
)
_PLAN = flags.DEFINE_string(
  'plan',
  None,
  'Print the memory, time and cost of the run, and exit. With a value, for'
  ' other devices, by compiling the step for them: v5p:4x4x4, v5e:2x4, h100:8.',
)
_PLAN_MFU = flags.DEFINE_float(
  'plan_mfu',
  0.4,
  'Model FLOP/s utilization (MFU) that --plan assumes, a share of the peak.',
)
_PRICE_PER_DEVICE_HOUR = flags.DEFINE_float(
  'price_per_device_hour',
  0.0,
  'Price of one device for one hour, for the cost in --plan. 0: no cost.',
)


def main(argv: list[str]) -> int:
  """Trains or plans; prints an error of the user as one line."""
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
  if _CONFIG.value is not None and _AUDIT.value:
    return _audit(_AUDIT.value)
  if _CONFIG.value is None or not _WORKDIR.value:
    raise app.UsageError(
      'got no --config or no --workdir, expected both, as in --config='
      'experiments/quickstart.py --workdir=runs/quickstart'
    )
  # Orbax logs many lines about saves that went well.
  logging.set_verbosity(logging.ERROR)
  # Imported here: --help and a mistyped flag should not wait for jax.
  import rich.console

  from hardware import host_memory
  from parallel import processes
  from training import run
  from training.reporting import goodput, library_logs, reporter

  library_logs.quiet()
  host_memory.reuse_freed_memory()
  _join_processes()
  _cache_compilations()
  workdir = pathlib.Path(_WORKDIR.value)
  console = rich.console.Console(soft_wrap=True, quiet=not processes.is_first())
  try:
    project = _WANDB.value if processes.is_first() else ''
    with wandb_mirror.following(workdir, project, console.print):
      result = run.run(
        _CONFIG.value,
        workdir,
        console,
        seconds_before=goodput.process_age(),
        make_sampler=_make_sampler,
      )
  except (ValueError, FileNotFoundError) as error:
    return _failed(error, exit_codes.USER_ERROR)
  except reporter.NonFiniteError as error:
    return _failed(error, exit_codes.NON_FINITE)
  except (processes.PeerError, disk.SaveError, locks.InUseError) as error:
    return _failed(error, exit_codes.TRY_AGAIN)
  return result.exit_code


def _make_sampler(model: Any) -> Any:
  """Makes the engine that samples, in a run with rollouts only."""
  from inference import rollouts

  return rollouts.make(model)


def _failed(error: Exception, code: int) -> int:
  """Prints an error in one line, with the process that has it."""
  print(f'{_who()}error: {error}', file=sys.stderr)
  return code


def _plan(target: str) -> int:
  """Prints the memory, time and cost of the run."""
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


def _audit(num_rows: int) -> int:
  """Prints rows of the data with the trained tokens marked; checks them."""
  from training.diagnosis import audit

  try:
    for line in audit.report(_CONFIG.value, num_rows):
      print(line)
  except (ValueError, FileNotFoundError) as error:
    return _failed(error, exit_codes.USER_ERROR)
  return 0


def _join_processes() -> None:
  """Joins the other processes of the run, if flags or environment say so."""
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


def _cache_compilations() -> None:
  """Keeps compiled programs on disk, for the next start."""
  from parallel import processes

  given = _COMPILATION_CACHE.value
  # GPUs of several processes share the work of tuning a program. One process
  # that finds the program in a cache of its own would keep the others waiting.
  is_given = given is not None or compilation_cache.VARIABLE in os.environ
  directory = compilation_cache.directory_of(given)
  if directory and (is_given or processes.count() == 1):
    compilation_cache.use(directory)


def _who() -> str:
  """Returns a prefix that names this process, if there are several."""
  from parallel import processes

  return f'process {processes.index()}: ' if processes.count() > 1 else ''


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    argv = flags_lib.with_flagfiles(argv)
  except flags.Error as error:
    sys.exit(f'error: {error}')
  if flags_lib.asks_for_list(argv):
    print(experiment_files.listing())
    sys.exit(0)
  argv = targets.with_default(argv)
  argv = targets.with_default(argv, _AUDIT.name, '4')
  # Before the flags are parsed: the file of the experiment imports jax, which
  # reads its environment once.
  targets.prepare_for(targets.value_in(argv))
  try:
    return flags_lib.parse(argv)
  except flags_lib.FlagError as error:
    sys.exit(f'error: {error}')


def _supervisor(argv: list[str]) -> supervisor.Supervisor | None:
  """Returns a supervisor of this command line if --max_restarts is given."""
  values = flags.FlagValues()
  path_flags.DEFINE_path('workdir', None, '', flag_values=values)
  flags.DEFINE_integer(_MAX_RESTARTS.name, 0, '', 0, flag_values=values)
  values.set_gnu_getopt()
  try:
    rest = values(flags_lib.with_flagfiles(argv), known_only=True)
  except flags.Error:
    return None  # the parser of all flags reports the error
  if not values.max_restarts or not values.workdir:
    return None
  return supervisor.Supervisor(
    [sys.executable, *rest, f'--{_WORKDIR.name}={values.workdir}'],
    pathlib.Path(values.workdir),
    max_restarts=values.max_restarts,
  )


def _run() -> None:
  """Supervises or trains; exits as in `training/lifecycle/exit_codes.py`."""
  if supervising := _supervisor(sys.argv):
    sys.exit(supervising.run())
  supervisor.die_with_supervisor()
  try:
    app.run(main, flags_parser=_parse_flags)
  except Exception:
    # Python itself would exit with 1, which means an error of the user.
    traceback.print_exc()
    sys.exit(exit_codes.CRASHED)


if __name__ == '__main__':
  _run()
