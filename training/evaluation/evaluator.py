"""The evaluator of a run: validation loss, tasks and samples, between steps."""

import dataclasses
from typing import Any

from training import assemble, experiment as experiment_lib, state as state_lib
from training.evaluation import model_port, samples, tasks, validation
from training.lifecycle import run_context
from training.optimizer import average
from training.rollouts import held_out


class Evaluator:
  """Evaluates the states of one run; `evaluate` is a hook of the loop."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    parts: assemble.Parts,
    context: run_context.RunContext,
  ):
    """Compiles nothing yet: the first evaluation does."""
    self._experiment = experiment
    self._parts = parts
    self._context = context
    self._eval_step = parts.learner.compile_eval_step()
    self._scorer = model_port.Scorer(parts.learner)
    self._sampler = samples.Sampler(
      parts.learner, parts.tokenizer, parts.eval_batches, parts.stop_ids
    )
    # The best checkpoint is chosen by the weights that will be frozen: by their
    # loss, or by their reward where the policy samples.
    is_sampled = isinstance(parts.eval_batches, held_out.HeldOut)
    self._ranked_by = 'reward' if is_sampled else 'loss'
    self._sign = -1.0 if is_sampled else 1.0
    is_raw = experiment.freeze.weights == 'raw'
    self._best_by = self._ranked_by if is_raw else f'average_{self._ranked_by}'
    rule, decay = experiment.optimizer.rule, experiment.ema_decay
    self._average = average.reader(rule, decay)
    self._place_average = parts.learner.placement.compile_weights(
      self._average or (lambda state: state.params)
    )
    self._last: tuple[int, float] | None = None  # step, see `loss_at`
    self._owed_step: int | None = None

  def evaluate(self, step: int, state: state_lib.TrainState) -> bool:
    """Records the validation loss of `state`, and its tasks if they are due.

    For a policy that samples, held-out rewards take the place of the loss. If
    the run averages its weights, the values of the average are recorded too.
    Tasks are measured, and samples drawn, with the weights that will be frozen.

    A signal to stop ends the evaluation without a record. The evaluation is
    then owed: a run that resumes from this step repeats it first.

    Returns:
      Whether the run is asked to stop.
    """
    try:
      values = self._validate(step, state.params, state)
      frozen = state.params
      if self._average is not None:
        average_params = self._place_average(state)
        averaged = self._validate(step, average_params, state)
        values |= {f'average_{k}': value for k, value in averaged.items()}
        if self._best_by != self._ranked_by:
          frozen = average_params
      measured = self._measure(step, frozen, state)
      drawn = self._sampler.draw(
        frozen,
        step,
        self._context.stop.between_batches(),
        _frozen_of(state),
      )
    except validation.Stopped:
      self._owed_step = step
      return True
    self._context.log.write('eval', step, values | measured)
    for i, sample in enumerate(drawn):
      self._context.log.write(
        'sample', step, {'index': i, **dataclasses.asdict(sample)}
      )
    best = values.get(self._best_by, values[self._ranked_by])
    self._last = step, self._sign * best
    say = self._context.terminal.say
    is_sampled = isinstance(self._parts.eval_batches, held_out.HeldOut)
    report = held_out.report if is_sampled else validation.report
    say(f'step {step}: {report(values)}')
    if measured:
      say(f'step {step}: {tasks.report(measured)}')
    return False

  def loss_at(self, step: int) -> float | None:
    """Returns the number that ranks the checkpoint of `step`, if evaluated.

    It is the loss, or minus the reward: the lowest is the best.
    """
    if self._last is None or self._last[0] != step:
      return None
    return self._last[1]

  def owes(self, step: int) -> bool:
    """Returns whether a signal cut the evaluation of `step` short."""
    return self._owed_step == step

  def _measure(self, step: int, params, state) -> dict[str, float]:
    """Returns the results of the tasks that are due."""
    every = self._experiment.evals.every_steps
    is_due = (
      step == self._experiment.num_steps or not every or step % every == 0
    )
    if not self._parts.tasks or not is_due:
      return {}
    return tasks.measure(
      self._parts.tasks,
      self._scorer,
      params,
      self._parts.tokenizer,
      has_bos=self._experiment.data.has_bos,
      should_stop=self._context.stop.between_batches(),
      frozen=_frozen_of(state),
    )

  def _validate(self, step: int, params, state) -> dict[str, float]:
    batches = self._parts.eval_batches
    if isinstance(batches, held_out.HeldOut):
      return batches.evaluate(step, state.replace(params=params))
    frozen = _frozen_of(state)
    return validation.evaluate(
      lambda params, batch: self._eval_step(params, batch, *frozen),
      params,
      batches,
      put_batch=self._parts.learner.placement.put_batch,
      num_bytes_V=self._parts.tokenizer.num_bytes_V(),
      predicts_text=self._experiment.objective.predicts_text,
      max_batches=self._experiment.eval_batches,
      should_stop=self._context.stop.between_batches(),
    )


def _frozen_of(state: state_lib.TrainState) -> tuple[Any, ...]:
  """Returns the weights that an evaluation reads beside the trained ones."""
  return () if state.frozen_params is None else (state.frozen_params,)
