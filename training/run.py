"""One run of life one: open, restore or start, loop, freeze.

`train.py` calls `run`. It goes on from where the workdir was left, so the same
command starts a run, resumes it, and does nothing once it is complete.

Several processes (`parallel/processes.py`) run the same code side by side. Each
of them makes every global batch and sends its devices their rows: the order of
the data, and its position in a checkpoint, are one thing that does not know how
many processes there are. Text is tokenised once per data directory, by whoever
comes first (`data/token_store.py`), and rows cost little. The first process
writes what is written once, and tells the user; errors are told by whoever has
them.
"""

import contextlib
import dataclasses
import json
import pathlib

import jax
import rich.console

from frozen import format as frozen_format, freeze, manifest as manifest_lib
from parallel import processes
from storage import layout
from training import (
  assemble,
  experiment as experiment_lib,
  frozen_models,
  hooks,
  loop,
)
from training.checkpoints import (
  checkpoint,
  init_from,
  saving,
  workdir as workdir_lib,
)
from training.diagnosis import diagnose
from training.lifecycle import interrupt
from training.optimizer import average
from training.reporting import goodput as goodput_lib, metrics, summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What a run came to."""

  step: int  # the last one taken
  exit_code: int  # 0, or 128 + the signal that stopped it


def run(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  console: rich.console.Console,
  *,
  seconds_before: float = 0.0,
) -> Result:
  """Trains to the experiment's last step, then freezes.

  Args:
    experiment: what to run.
    workdir: where everything is written; what is there is gone on with.
    console: where the user is told.
    seconds_before: how long the process has been running for this.

  Raises:
    ValueError, FileNotFoundError: the experiment, the workdir or the data
      cannot be used; nothing was changed.
    loop.NonFiniteError: a loss was not finite.
    processes.PeerError: another process failed, and this one did not.
    saving.SaveError: the last step, or what is frozen, cannot be written.
    locks.InUseError: another run writes there.
  """
  processes.check_same(
    '--config', json.dumps(experiment.to_dict(), sort_keys=True)
  )
  experiment.validate()
  with processes.together('workdir'):
    workdir_lib.check(workdir, experiment)
  saved = checkpoint.Checkpoints(
    workdir, experiment.checkpoint, workdir_lib.identity(experiment)
  )
  step = _complete_step(experiment, workdir, saved, console)
  if step is not None:
    return Result(step=step, exit_code=0)
  with contextlib.ExitStack() as stack:
    with processes.together('workdir'), saving.writing(workdir):
      if processes.is_first():
        stack.enter_context(
          workdir_lib.held(workdir, lambda text: summary.say(console, text))
        )
    workdir_lib.check_shared(workdir)
    stack.enter_context(contextlib.closing(saved))
    saved.recover(lambda text: summary.say(console, text))
    step = saved.latest_step() or 0
    goodput = goodput_lib.Goodput(
      workdir if processes.is_first() else None,
      first_step=step,
      seconds_before=seconds_before,
    )
    result = Result(step=step, exit_code=0)
    if step < experiment.num_steps or saved.evaluation_owed:
      result = _train(experiment, workdir, console, saved, goodput)
    if experiment.freeze.enabled and not result.exit_code:
      with goodput.during('freeze'), processes.together('freezing'):
        if processes.is_first():
          _freeze(experiment, workdir, result.step, console)
    goodput.write()
  summary.say(console, goodput_lib.report(goodput.life()))
  return result


def _complete_step(experiment, workdir, saved, console) -> int | None:
  """Returns the step of a run that has nothing left to do; tells of it."""
  frozen = workdir / layout.FROZEN
  step = saved.newest_step() or 0
  is_trained = step >= experiment.num_steps and not saved.newest_owes()
  why_not = ''
  if is_trained and experiment.freeze.enabled and processes.is_first():
    why_not = _unlike(frozen, step, experiment)
  # As the first sees it: a network file system may show others less.
  is_complete, is_trained, step = processes.gather(
    is_trained and not why_not, is_trained, step
  )[0].tolist()
  if not is_trained:
    return None
  summary.tell_unused(
    step, experiment, workdir_lib.changes(workdir, experiment), console
  )
  if not is_complete:
    if why_not:
      summary.say(console, f'{why_not}: freezing')
    return None
  where = f', frozen in {frozen}' if experiment.freeze.enabled else ''
  summary.say(console, f'{workdir} is complete: step {step}{where}')
  return step


def _unlike(
  frozen: pathlib.Path, step: int, experiment: experiment_lib.Experiment
) -> str:
  """Says how a frozen directory is not what a run would hand over now."""
  if not frozen.exists():
    return f'nothing is in {frozen}'
  try:
    manifest = manifest_lib.read(frozen)
    manifest_lib.check_files(frozen, manifest)
    generation = frozen_format.read_generation(frozen)
  except (OSError, ValueError) as error:
    return str(error)
  wanted = experiment.freeze
  weights = wanted.weights
  if weights == 'auto':
    has_average = average.reader(
      experiment.optimizer.rule, experiment.ema_decay
    )
    weights = 'raw' if has_average is None else 'average'
  for name, got, expected in (
    ('step', manifest.step, step),
    ('freeze.dtype', manifest.dtype, wanted.dtype),
    ('freeze.weights', manifest.weights, weights),
    ('freeze.temperature', generation['temperature'], wanted.temperature),
    ('freeze.max_tokens', generation['max_tokens'], wanted.max_tokens),
  ):
    if got != expected:
      return f'{frozen} has {name} = {got}, not {expected}'
  return ''


def _freeze(experiment, workdir, step, console) -> None:
  frozen = workdir / layout.FROZEN
  with saving.writing(frozen, saved=f'step {step} is saved'):
    manifest = freeze.freeze_checkpoint(
      workdir,
      step=step,
      out=frozen,
      dtype=experiment.freeze.dtype,
      weights=experiment.freeze.weights,
      generation={
        'temperature': experiment.freeze.temperature,
        'max_tokens': experiment.freeze.max_tokens,
      },
      # The run's own hand-off: a longer run replaces that of a shorter one.
      overwrite=True,
    )
  summary.show_manifest(frozen, manifest, console)


def _train(experiment, workdir, console, saved, goodput) -> Result:
  changes = workdir_lib.changes(workdir, experiment)
  parts = _assemble(experiment, workdir, console)
  first_step = saved.latest_step() or 0
  if first_step:
    frozen_models.check_lineage(
      experiment.objective, workdir_lib.recorded_lineage(workdir)
    )
  try:
    state, progress = _start_or_restore(experiment, parts, saved, goodput)
  except checkpoint.MismatchError as error:
    raise ValueError(_explained(error, workdir, changes)) from None
  # Only now: a run that cannot begin changes nothing.
  _record(experiment, workdir, parts, first_step, console)
  summary.describe(experiment, parts, first_step, console)
  if first_step and changes:
    summary.say(console, 'changed    ' + '\n           '.join(changes))
  goodput.write()
  with contextlib.ExitStack() as stack:
    # An attempt that failed is told of, too.
    stack.callback(goodput.write)
    stack.callback(parts.batches.close)
    log = hooks.WithEpochs(
      _open_log(workdir, saved, console), parts.batches.epochs
    )
    stack.callback(log.close)
    terminal = stack.enter_context(
      metrics.Terminal(console, num_steps=experiment.num_steps)
    )
    reporter = loop.Reporter(
      log,
      terminal,
      goodput,
      learning_rate=parts.learner.schedule,
      mfu_per_token_rate=parts.learner.flops_per_token
      / parts.learner.peak_flops_per_s(),
      last_checkpoint=saved.finished_step,
    )
    stack.callback(reporter.close)
    stop = stack.enter_context(
      interrupt.Interrupt(
        grace_s=experiment.checkpoint.grace_s, wait_for_steps=reporter.wait
      )
    )
    keeper = hooks.Keeper(
      experiment,
      parts,
      saved,
      progress,
      reporter,
      stop,
      hooks.Outlets(log, terminal),
    )
    # Whatever else goes wrong: a save in flight still has things to tell.
    stack.callback(saved.wait)
    train_step = parts.learner.compile_train_step()
    stack.enter_context(
      _diagnosing(experiment, parts, saved, goodput, train_step)
    )
    if not _is_stopped_in_owed(keeper, saved, state, goodput):
      state = loop.run(
        state,
        parts.batches,
        train_step,
        first_step=first_step,
        num_steps=experiment.num_steps,
        put_batch=parts.learner.placement.put_batch,
        reporter=reporter,
        report_every=experiment.log_every_steps,
        hooks=_hooks(experiment, keeper),
        should_stop=stop.after_step,
      )
    goodput.enter('end')
    with goodput.during('save'):
      keeper.finish(state)
  step = saved.latest_step()
  if processes.is_first():
    summary.summarise(workdir, step, stop, console)
    summary.say_epochs(parts.batches.epochs(step or 0), console)
  return Result(step=step, exit_code=stop.exit_code)


def _assemble(experiment, workdir, console) -> assemble.Parts:
  """Builds the parts of the run; writes no more than its tokenizer."""
  # Before anything is written: data that cannot be read leaves no traces.
  with processes.together('data'):
    documents = assemble.open_documents(experiment)
  with processes.together('workdir'):
    if processes.is_first():
      workdir_lib.prepare(workdir)
  with saving.writing(f'{workdir} or {experiment.data.data_dir}'):
    return assemble.assemble(
      experiment, workdir, lambda text: summary.say(console, text), documents
    )


def _record(experiment, workdir, parts, first_step, console) -> None:
  """Writes what the run is; says what it evaluates on if that is new."""
  before = workdir_lib.evaluated_before(workdir)
  now = parts.eval_batches.source.store.digest
  with processes.together('run.json'):
    if processes.is_first():
      phases = parts.batches.get_state()['phases']
      with saving.writing(workdir):
        lineage = None if first_step else init_from.lineage(experiment)
        workdir_lib.record(workdir, experiment, phases, lineage)
        workdir_lib.record_data(workdir, parts.describe_data())
  if before and before != now:
    summary.say(
      console,
      f'WARNING    evaluating on tokens with SHA-256 {now[:12]}, until now'
      f' {before[:12]}: losses before and after are of different text',
    )


def _explained(error, workdir, changes) -> str:
  """Says which values made a state of another structure."""
  if not changes:
    return str(error)
  return (
    f'--workdir={workdir} was trained with another optimizer or model:'
    f' {"; ".join(changes)}; set back what changes their state, or use another'
    f' --workdir ({error})'
  )


def _open_log(workdir, saved, console) -> metrics.Log:
  with processes.together('metrics'):
    if processes.is_first():
      return metrics.MetricsLog(
        workdir,
        first_step=saved.latest_step() or 0,
        evaluation_owed=saved.evaluation_owed,
        tell=lambda text: summary.say(console, text),
      )
  return metrics.NoLog()


def _is_stopped_in_owed(keeper, saved, state, goodput) -> bool:
  """Does the evaluation that the last start owes; whether it owes it still."""
  if not saved.evaluation_owed:
    return False
  with goodput.during('evaluate'):
    return keeper.evaluate_owed(saved.latest_step(), state)


def _hooks(experiment, keeper) -> list[loop.Hook]:
  saving_every = experiment.checkpoint.every_steps
  return [
    loop.Hook(experiment.eval_every_steps, keeper.evaluate, 'evaluate'),
    loop.Hook(saving_every, keeper.save, 'save', when_stopped=True),
  ]


@contextlib.contextmanager
def _diagnosing(experiment, parts, saved, goodput, train_step):
  """Makes a NonFiniteError say where it comes from: goes back, and looks."""
  data_start = parts.batches.get_state()

  def restart():
    saved.wait()
    parts.batches.set_state(data_start)
    state, _ = _start_or_restore(experiment, parts, saved, goodput)
    return state, saved.latest_step() or 0

  try:
    yield
  except loop.NonFiniteError as error:
    if not experiment.diagnose_non_finite:
      raise
    goodput.enter('end')
    raise diagnose.explained(
      error,
      diagnose.Replay(
        learner=parts.learner,
        train_step=train_step,
        batches=parts.batches,
        restart=restart,
      ),
    ) from None


def _start_or_restore(experiment, parts, saved, goodput):
  """Returns the placed state and its progress; moves the data along."""
  if saved.latest_step() is None:
    key = jax.random.key(experiment.seed)
    if experiment.init_from:
      params = init_from.read(experiment)
      return parts.learner.init_with(key, params), checkpoint.Progress()
    return parts.learner.init(key), checkpoint.Progress()
  with goodput.during('restore'):
    state, progress = saved.restore(parts.learner.placement.abstract_whole())
    parts.batches.set_state(progress.data_state)
    return parts.learner.placed(state), progress
