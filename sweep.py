"""Sweeps: trains an experiment at many points, and finds the best one.

    python sweep.py --config=experiments/quickstart.py --config.num_steps=100 \
      --sweep=experiments/sweeps/quickstart_lr.py --workdir=runs/lr

A sweep file says which fields vary, how points are chosen, and how many seeds
each has (`training/sweep.py`). The same command resumes a sweep that was
killed: a finished trial never runs again, and an unfinished trial resumes from
its checkpoint. Trials that failed with an error run again with --resume:

    python sweep.py ... --resume=errored          # from their checkpoint
    python sweep.py ... --resume=restart_errored  # from their start

Trials that differ in numbers only (learning rate, schedule, weight decay, seed)
run together in one program; --notogether trains one after the other, with the
same numbers.

The best point is trained again, and frozen, by

    python train.py --flagfile=runs/lr/best.flags --workdir=runs/best

Several processes may share a sweep. --processes=4 starts four on this host. On
other hosts that share --workdir, start the same command, any number of times.
SQLite is enough for one host; several hosts need a database server and its
driver (pip install "psycopg[binary]"):

    sbatch --array=0-7 --wrap "python sweep.py --config=... --sweep=... \
      --workdir=/shared/lr --storage=postgresql://me:secret@db/sweeps"

Under Kubernetes, the same command in an Indexed Job, with completions and
parallelism of 8, NUM_PROCESSES=8 in its environment, and a volume for
--workdir. Each process takes its share of the trials. Under Ray, or any other
launcher, a task calls this command: the scheduler does not need to know the
trials, because the storage hands them out, and hands out again the trials of a
task that died. Exit codes are the same as of train.py
(training/lifecycle/exit_codes.py); 1 also if no trial has a finite value.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import traceback

from absl import app, flags, logging

from checks import path_flags
from hardware import compilation_cache
from training import experiment_files, flags as flags_lib
from training.lifecycle import exit_codes, supervisor
from training.reporting import wandb_mirror

_CONFIG = flags_lib.define_config(
  'The experiment: a file in experiments/, with an optional :variant;'
  ' --config=list shows them. Flags set any field, as --config.num_steps=100.'
)
_SWEEP = path_flags.DEFINE_path(
  'sweep', None, 'The sweep: a file in experiments/sweeps/.'
)
_WORKDIR = path_flags.DEFINE_path(
  'workdir',
  None,
  'Directory of the sweep. It is created, or the sweep in it is resumed.',
)
_STORAGE = flags.DEFINE_string(
  'storage',
  '',
  'Database of the sweep, as Optuna takes it: postgresql://user:password@host/'
  'name. Empty (default): a SQLite file in --workdir.',
)
_RESUME = flags.DEFINE_enum(
  'resume',
  'unfinished',
  ['unfinished', 'errored', 'restart_errored'],
  'The trials to run. unfinished: trials that did not end. errored: also trials'
  ' that failed with an error, from their checkpoint. restart_errored: also'
  ' these, from their start.',
)
_METRIC = flags.DEFINE_string(
  'metric',
  '',
  'The value that judges trials, in place of the metric of the sweep file:'
  ' loss, bits_per_byte, accuracy, TASK/SCORE of config.evals.tasks, reward, or'
  ' a speed, as tokens_per_s. A trial has the mean over its seeds.',
)
_DIRECTION = flags.DEFINE_enum(
  'direction',
  None,
  ['minimize', 'maximize'],
  'The better direction of --metric. Default: known from its name (loss:'
  ' minimize; accuracy, reward, tokens_per_s: maximize).',
)
_PROCESSES = flags.DEFINE_integer(
  'processes', 1, 'Processes on this host that share the sweep.', lower_bound=1
)
_TOGETHER = flags.DEFINE_bool(
  'together',
  True,
  'Run trials that differ in numbers only in one program. --notogether: one'
  ' after the other.',
)
_TRIALS_AT_ONCE = flags.DEFINE_integer(
  'trials_at_once',
  0,
  'Trials that a process claims at a time, to run them together. 0 (default):'
  ' as the sweep says. If several processes share a sweep, set it to the number'
  ' of trials per process.',
  lower_bound=0,
)
_WANDB = flags.DEFINE_string('wandb', '', wandb_mirror.HELP)
_COMPILATION_CACHE = path_flags.DEFINE_path(
  'compilation_cache', None, compilation_cache.HELP
)


def main(argv: list[str]) -> int:
  """Runs the sweep; prints an error of the user as one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  if _CONFIG.value is None or not _WORKDIR.value or not _SWEEP.value:
    raise app.UsageError(
      'got no --config, no --sweep or no --workdir, expected all three, as in'
      ' --config=experiments/quickstart.py'
      ' --sweep=experiments/sweeps/quickstart_lr.py --workdir=runs/lr'
    )
  # Orbax logs many lines about saves that went well.
  logging.set_verbosity(logging.ERROR)
  from studies.sweeps import sweep_files, worker
  from training.reporting import library_logs

  library_logs.quiet()
  try:
    search = worker.Search(
      sweep=_judged(sweep_files.load(_SWEEP.value)),
      experiment=_CONFIG.value,
      workdir=pathlib.Path(_WORKDIR.value).absolute(),
      url=_STORAGE.value,
      together=_TOGETHER.value,
      trials_at_once=_TRIALS_AT_ONCE.value,
    )
    return _run(search)
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    return exit_codes.USER_ERROR


def _judged(sweep):
  """Returns the sweep with --metric and --direction."""
  from studies.comparison import metric_names, run_values

  metric = _METRIC.value or sweep.metric
  direction = _DIRECTION.value or (
    metric_names.direction_of(metric) if _METRIC.value else sweep.direction
  )
  if direction is None:
    # A misspelt name has its own error.
    metric_names.check(_CONFIG.value, metric)
    raise ValueError(
      f'--direction: got none with --metric={metric}, expected minimize or'
      ' maximize: the direction does not follow from the name'
    )
  if metric in run_values.SPEEDS and _PROCESSES.value > 1:
    raise ValueError(
      f'--processes: got {_PROCESSES.value} with metric {metric}, expected 1:'
      ' processes on one host slow each other down'
    )
  return dataclasses.replace(sweep, metric=metric, direction=direction)


def _run(search) -> int:
  """Trains the remaining trials of the sweep, and prints its results."""
  import rich.console

  from hardware import host_memory
  from storage import disk
  from studies.sweeps import claims, worker
  from studies.sweeps.reporting import (
    progress,
    report,
    results,
    tensorboard,
    wandb_runs,
  )

  if _WANDB.value:
    wandb_mirror.library(_WANDB.value)  # raises its errors before the work
  console = rich.console.Console(soft_wrap=True)
  store = worker.open_store(search)
  shown = progress.Progress(console, store)
  is_child = _INDEX in os.environ
  if not is_child:
    claims.Claims(store, search.workdir).begin(_RESUME.value)
  host_memory.reuse_freed_memory()
  if directory := compilation_cache.directory_of(_COMPILATION_CACHE.value):
    compilation_cache.use(directory)
  if is_child:
    return worker.run(search, store, tell=shown.say)
  with shown.shown():
    if _PROCESSES.value > 1:
      code = _run_children(_PROCESSES.value, search, shown)
    else:
      code = worker.run(search, store, shown.update, shown.say)
  if code:
    return code
  found = results.gather(store)
  with disk.writing(search.workdir, saved='the trials are in the storage'):
    rerun = results.rerun_flags(found, _config_flags)
    results.save(found, search.experiment, search.workdir, rerun)
    report.save(found, search.experiment, search.workdir, store.place, rerun)
    tensorboard.save(found, search.workdir)
  progress.show_results(found, console)
  if _WANDB.value:
    count = wandb_runs.save(search.workdir, search.sweep.name, _WANDB.value)
    shown.say(f'{count} records sent to {_WANDB.value} at W&B')
  shown.say(
    f'written to {search.workdir}: report.html, figures/, results.csv,'
    ' results.json, tensorboard/ (HParams)'
  )
  if rerun:
    shown.say(
      'to train the best point: python train.py'
      f' --flagfile={search.workdir / results.BEST} --workdir=...'
    )
  return 0 if found.best is not None else exit_codes.USER_ERROR


# --config and its overrides, as they were given.
_config_flags: list[str] = []
_INDEX = 'SWEEP_PROCESS'  # set in processes of --processes


def _run_children(num: int, search, shown) -> int:
  """Runs processes that share the sweep; returns the worst exit code."""
  from studies.sweeps import worker

  # One process would claim all trials, to run them together.
  share = -(-search.sweep.count() // num)
  share = min(share, worker.most_at_once(search))
  # If this process is killed, its children end too: they would run on unseen.
  children = [
    subprocess.Popen(
      [sys.executable, *sys.argv, f'--trials_at_once={share}'],
      env=os.environ | {_INDEX: str(i), supervisor.PARENT: str(os.getpid())},
      stdout=subprocess.DEVNULL,
    )
    for i in range(num)
  ]
  asked: list[int] = []

  def pass_on(number, frame):
    del frame
    asked.append(number)
    for child in children:
      child.send_signal(number)

  before = {
    number: signal.signal(number, pass_on)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    for child in children:
      while True:
        try:
          child.wait(timeout=2.0)
          break
        except subprocess.TimeoutExpired:
          shown.tell_finished()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  codes = [exit_codes.of_returncode(child.returncode) for child in children]
  if asked:
    return 128 + asked[0]
  return max(codes)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    argv = flags_lib.with_flagfiles(argv)
    if flags_lib.asks_for_list(argv):
      print(experiment_files.listing())
      sys.exit(0)
    _config_flags[:] = flags_lib.config_flags_in(argv)
    return flags_lib.parse(argv)
  except (flags.Error, flags_lib.FlagError) as error:
    sys.exit(f'error: {error}')


def _start() -> None:
  """Runs; exits as in `training/lifecycle/exit_codes.py`."""
  supervisor.die_with_supervisor()
  try:
    app.run(main, flags_parser=_parse_flags)
  except Exception:
    # Python itself would exit with 1, which means an error of the user.
    traceback.print_exc()
    sys.exit(exit_codes.CRASHED)


if __name__ == '__main__':
  _start()
