"""One run of life one: open, restore or start, train, freeze.

`train.py` calls `run`. It resumes the run in the workdir, so the same command
starts a run, resumes it, and does nothing once it is complete.

A run may have several processes (`parallel/processes.py`), which execute the
same code. Each process makes every global batch and sends its devices their
rows. So the order of the data, and the position in it that a checkpoint holds,
do not depend on the number of processes. Making rows is cheap, because text is
tokenised once per data directory (`data/token_store.py`). The first process
writes the workdir and prints for the user. An error is printed by the process
that has it.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import rich.console

from frozen import (
  adapters as frozen_adapters,
  draft_heads,
  format as frozen_format,
  freeze,
  manifest as manifest_lib,
  run_record,
)
from parallel import processes
from storage import disk, file_names
from training import adapters, assemble, experiment as experiment_lib, loop
from training.checkpoints import (
  checkpoint,
  init_from,
  saver as saver_lib,
  workdir as workdir_lib,
)
from training.diagnosis import diagnose
from training.evaluation import evaluator as evaluator_lib
from training.frozen_inputs import frozen_models
from training.lifecycle import run_context
from training.optimizer import average
from training.planning import choices
from training.reporting import (
  goodput as goodput_lib,
  report,
  reporter,
  summary,
)
from training.rollouts import batches as rollout_batches, reports, sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """The end of one start of a run."""

  step: int  # the last step that was taken
  exit_code: int  # 0, or 128 + the signal that stopped the run


class _Asked(NamedTuple):
  """The requests of the caller of a run, besides its experiment."""

  stop_after: int | None
  make_sampler: sampler.MakeSampler | None


def run(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  console: rich.console.Console,
  *,
  seconds_before: float = 0.0,
  stop_after: int | None = None,
  make_sampler: sampler.MakeSampler | None = None,
) -> Result:
  """Trains to the last step of an experiment, then freezes.

  Args:
    workdir: receives all files of the run. A run in it is resumed.
    seconds_before: age of the process when this is called.
    stop_after: a step at which the run is saved and ends, as by a signal, to be
      resumed later. None: the last one.
    make_sampler: makes the engine of a run with rollouts.

  Raises:
    ValueError, FileNotFoundError: the experiment, the workdir or the data
      cannot be used; nothing was changed.
    reporter.NonFiniteError: a loss was not finite.
    processes.PeerError: another process of the run failed.
    disk.SaveError: the last checkpoint or the frozen directory cannot be
      written.
    locks.InUseError: another run writes into the workdir.
  """
  processes.check_same(
    '--config', json.dumps(experiment.to_dict(), sort_keys=True)
  )
  experiment.validate()
  asked = _Asked(stop_after, make_sampler)
  chosen = choices.make(experiment, before=workdir_lib.config_before(workdir))
  experiment = chosen.experiment
  # Each process has chosen from the devices and the run.json that it sees.
  processes.check_same('chosen', json.dumps(experiment.to_dict()))
  with processes.together('workdir'):
    workdir_lib.check(workdir, experiment)
  saved = checkpoint.Checkpoints(
    workdir, experiment.checkpoint, workdir_lib.identity(experiment)
  )
  say = functools.partial(summary.say, console)
  with processes.together('checkpoints'):
    seen = saved.peek()
  step = _complete_step(experiment, workdir, seen, console)
  if step is not None:
    return Result(step=step, exit_code=0)
  for reason in chosen.reasons:
    say(f'chosen     {reason}')
  with contextlib.ExitStack() as stack:
    with processes.together('workdir'), disk.writing(workdir):
      if processes.is_first():
        stack.enter_context(workdir_lib.held(workdir, say))
    workdir_lib.check_shared(workdir)
    stack.enter_context(contextlib.closing(saved))
    resume = saved.open(say)
    if experiment.eval_at_start and not resume.step:
      resume = dataclasses.replace(resume, evaluation_owed=True)
    goodput = goodput_lib.Goodput(
      workdir if processes.is_first() else None,
      first_step=resume.step,
      seconds_before=seconds_before,
      tell=say,
    )
    result = Result(step=resume.step, exit_code=0)
    if resume.step < experiment.num_steps or resume.evaluation_owed:
      result = _train(
        experiment, workdir, console, saved, resume, goodput, asked
      )
    is_whole = result.step >= experiment.num_steps and not result.exit_code
    if experiment.freeze.enabled and is_whole:
      with goodput.during('freeze'), processes.together('freezing'):
        if processes.is_first():
          _freeze(experiment, workdir, result.step, console)
    goodput.write()
    if processes.is_first():
      report.save(workdir, say)
  say(goodput_lib.report(goodput.life()))
  return result


def _complete_step(experiment, workdir, resume, console) -> int | None:
  """Returns the last step if the run is complete, and says so; else None."""
  frozen, step = workdir / file_names.FROZEN, resume.step
  is_trained = step >= experiment.num_steps and not resume.evaluation_owed
  why_not = ''
  if is_trained and experiment.freeze.enabled and processes.is_first():
    why_not = _unlike(frozen, step, experiment)
  # The first process decides: on a network file system, another process may see
  # older files.
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
  """Returns the first difference from the result of freezing now, or ''."""
  if not frozen.exists():
    return f'nothing is in {frozen}'
  try:
    manifest, dtype = _read_manifest(frozen, experiment)
    manifest_lib.check_files(frozen, manifest)
    run = run_record.read(frozen.parent)
    # A head alone has neither settings of requests nor a template.
    is_model = not experiment.objective.trains_heads_alone
    generation = frozen_format.read_generation(frozen) if is_model else {}
    template = frozen_format.read_chat_template(frozen) if is_model else ''
  except (OSError, ValueError) as error:
    return str(error)
  wanted = experiment.freeze
  weights = wanted.weights
  if weights == 'auto':
    has_average = average.reader(
      experiment.optimizer.rule, experiment.ema_decay
    )
    weights = 'raw' if has_average is None else 'average'
  settings = freeze.generation_of(
    run, freeze.chosen_generation(dataclasses.asdict(wanted))
  )
  settings = settings if is_model else {}
  for name, got, expected in (
    ('step', manifest.step, step),
    ('freeze.dtype', dtype, wanted.dtype),
    ('freeze.weights', manifest.weights, weights),
    *(
      (f'freeze.{name}', generation.get(name), settings.get(name))
      for name in generation | settings
    ),
  ):
    if got != expected:
      return f'{frozen} has {name} = {got}, not {expected}'
  if is_model and template != run.get('base', {}).get('chat_template', ''):
    return f'{frozen} has another chat template'
  return ''


def _read_manifest(
  frozen: pathlib.Path, experiment: experiment_lib.Experiment
) -> tuple[freeze.Frozen, str]:
  """Returns the manifest of the frozen result, and its dtype.

  Raises:
    OSError, ValueError: something else is there.
  """
  if experiment.adapter.rank and not experiment.freeze.merge_adapter:
    # The dtype of an adapter is always the same.
    manifest = frozen_adapters.read_manifest(frozen)
    return manifest, experiment.freeze.dtype
  if experiment.objective.trains_heads_alone:
    return draft_heads.read_manifest(frozen), experiment.freeze.dtype
  manifest = manifest_lib.read(frozen)
  return manifest, manifest.dtype


def _freeze(experiment, workdir, step, console) -> None:
  """Freezes a step into the workdir."""
  frozen = workdir / file_names.FROZEN
  with disk.writing(frozen, saved=f'step {step} is saved'):
    manifest = freeze.freeze_checkpoint(
      workdir,
      step=step,
      out=frozen,
      dtype=experiment.freeze.dtype,
      weights=experiment.freeze.weights,
      merge_adapter=experiment.freeze.merge_adapter,
      generation=freeze.chosen_generation(
        dataclasses.asdict(experiment.freeze)
      ),
      # The directory belongs to this run. A longer run replaces it.
      overwrite=True,
    )
  summary.show_manifest(frozen, manifest, console)


def _train(
  experiment, workdir, console, saved, resume, goodput, asked
) -> Result:
  """Trains from a checkpoint to the last step, or to a stop."""
  parts, state, progress = _begin(
    experiment, workdir, console, saved, resume, goodput, asked.make_sampler
  )
  with (
    report.if_it_fails(workdir, functools.partial(summary.say, console))
    if processes.is_first()
    else contextlib.nullcontext(),
    goodput.written(),
    contextlib.closing(parts.batches),
    run_context.opened(
      experiment,
      parts,
      workdir,
      console,
      goodput=goodput,
      resume=resume,
      last_checkpoint=saved.wait,
    ) as context,
  ):
    evaluator = evaluator_lib.Evaluator(experiment, parts, context)
    saver = saver_lib.Saver(
      experiment,
      parts,
      context,
      saved=saved,
      evaluator=evaluator,
      before=progress,
      first_step=resume.step,
    )
    if isinstance(parts.batches, rollout_batches.RolloutBatches):
      told = reports.Reports(experiment, workdir, context, resume.step)
      parts.batches.tell = told.tell
    with contextlib.closing(saver):
      state = _take_steps(
        experiment,
        parts,
        context,
        saved,
        resume,
        (evaluator, saver),
        state,
        asked.stop_after,
      )
      goodput.enter('end')
      with goodput.during('save'):
        saver.finish(state)
  step = saved.wait()
  if processes.is_first():
    summary.summarise(workdir, step, context.stop, console)
    summary.say_epochs(parts.batches.epochs(step or 0), console)
  return Result(step=step or 0, exit_code=context.stop.exit_code)


def _begin(experiment, workdir, console, saved, resume, goodput, make_sampler):
  """Returns the parts of the run, its state and its progress; records it."""
  changes = workdir_lib.changes(workdir, experiment)
  parts = _assemble(experiment, workdir, console, make_sampler)
  if resume.step:
    lineage = workdir_lib.recorded_lineage(workdir)
    frozen_models.check_lineage(
      experiment.objective, experiment.init_from, lineage
    )
    adapters.check_base(experiment, lineage)
  try:
    state, progress = _start_or_restore(
      experiment, parts, saved, goodput, resume.step
    )
  except checkpoint.MismatchError as error:
    raise ValueError(_explained(error, workdir, changes)) from None
  # Recorded only now: a run that cannot begin changes nothing.
  _record(experiment, workdir, parts, resume.step, console)
  summary.describe(experiment, parts, resume.step, console)
  if resume.step and changes:
    summary.say(console, 'changed    ' + '\n           '.join(changes))
  return parts, state, progress


def _assemble(experiment, workdir, console, make_sampler) -> assemble.Parts:
  """Builds the parts of the run; writes only its tokenizer."""
  # Opened before anything is written: unreadable data leaves no files.
  with processes.together('data'):
    documents = assemble.open_documents(experiment)
  with processes.together('workdir'):
    if processes.is_first():
      workdir_lib.prepare(workdir)
  with disk.writing(f'{workdir} or {experiment.data.data_dir}'):
    return assemble.assemble(
      experiment,
      workdir,
      lambda text: summary.say(console, text),
      documents,
      make_sampler,
    )


def _record(experiment, workdir, parts, first_step, console) -> None:
  """Writes run.json and data.json; warns if the evaluation data changed."""
  before = workdir_lib.evaluated_before(workdir)
  now = parts.eval_batches.source.store.digest
  with processes.together('run.json'):
    if processes.is_first():
      phases = parts.batches.get_state()['phases']
      with disk.writing(workdir):
        start = (
          None if first_step else init_from.describe(experiment, parts.stop_ids)
        )
        workdir_lib.record(workdir, experiment, phases, start)
        workdir_lib.record_data(workdir, parts.describe_data())
  if before and before != now:
    summary.say(
      console,
      f'WARNING    evaluating on tokens with SHA-256 {now[:12]}, until now'
      f' {before[:12]}: losses before and after are of different text',
    )


def _explained(error, workdir, changes) -> str:
  """Returns an error text that names the changed values of the experiment."""
  if not changes:
    return str(error)
  return (
    f'--workdir={workdir} was trained with another optimizer or model:'
    f' {"; ".join(changes)}; set back the fields that change their state,'
    f' or use another --workdir ({error})'
  )


def _take_steps(
  experiment, parts, context, saved, resume, hooks, state, stop_after
):
  """Takes the steps, after an evaluation that is owed; returns the state."""
  evaluator, saver = hooks
  goodput = context.reporter.goodput
  train_step = parts.learner.compile_train_step()
  if resume.evaluation_owed:
    with goodput.during('evaluate'):
      if evaluator.evaluate(resume.step, state):
        return state
      if resume.step:  # there is no checkpoint of step 0
        saver.settle(resume.step)
  first_hooks = []
  if isinstance(parts.batches, rollout_batches.RolloutBatches):
    # The first hook: a checkpoint holds the rows of the next steps.
    with goodput.during('rollout'):
      parts.batches.refresh(resume.step, state)
    every = parts.batches.steps_per_rollout
    first_hooks.append(loop.Hook(every, parts.batches.refresh, 'rollout'))
  with _diagnosing(experiment, parts, saved, goodput, train_step):
    return loop.run(
      state,
      parts.batches,
      train_step,
      first_step=resume.step,
      num_steps=experiment.num_steps,
      put_batch=parts.learner.placement.put_batch,
      reporter=context.reporter,
      report_every=experiment.log_every_steps,
      hooks=[
        *first_hooks,
        # Evaluation before saving: a checkpoint has the loss of its own step.
        loop.Hook(experiment.eval_every_steps, evaluator.evaluate, 'evaluate'),
        loop.Hook(
          experiment.checkpoint.every_steps,
          saver.save,
          'save',
          when_stopped=True,
        ),
      ],
      should_stop=lambda step: (
        context.stop.after_step(step) or step == stop_after
      ),
    )


@contextlib.contextmanager
def _diagnosing(experiment, parts, saved, goodput, train_step):
  """Adds to a NonFiniteError the first bad tensor, found by a replay."""
  data_start = parts.batches.get_state()

  def restart():
    step = saved.wait()
    parts.batches.set_state(data_start)
    state, _ = _start_or_restore(experiment, parts, saved, goodput, step)
    return state, step or 0

  try:
    yield
  except reporter.NonFiniteError as error:
    # The weights that sampled the earlier batches are gone.
    if not experiment.diagnose_non_finite or experiment.rollouts:
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


def first_key(seed: int) -> jax.Array:
  """Returns the key of a new run, from a seed of 64 bits."""
  key = jax.random.key(seed & 0xFFFFFFFF)  # JAX keeps 32 bits of a seed
  high_bits = seed >> 32 & 0xFFFFFFFF
  return jax.random.fold_in(key, high_bits) if high_bits else key


def _start_or_restore(experiment, parts, saved, goodput, step):
  """Returns the placed state and its progress; moves the data to `step`."""
  if not step:
    key = first_key(experiment.seed)
    init_from.check_tokenizer(experiment, parts.tokenizer)
    if experiment.init_from and not experiment.is_base_frozen:
      params = init_from.read(experiment)
      return parts.learner.init_with(key, params), checkpoint.Progress()
    return parts.learner.init(key), checkpoint.Progress()
  with goodput.during('restore'):
    state, progress = saved.restore(parts.learner.placement.abstract_whole())
    parts.batches.set_state(progress.data_state)
    return parts.learner.placed(state), progress
