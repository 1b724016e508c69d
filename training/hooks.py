"""What a run does now and then besides training: evaluate, and save.

`training/run.py` hands these to the loop as hooks.
"""

from training import (
  assemble,
  checkpoint,
  config as config_lib,
  evaluate,
  loop,
  metrics,
  state as state_lib,
)


class Keeper:
  """The two hooks of a run: evaluates, and saves with what it evaluated."""

  def __init__(
    self,
    experiment: config_lib.Experiment,
    parts: assemble.Parts,
    saved: checkpoint.Checkpoints,
    progress: checkpoint.Progress,
    reporter: loop.Reporter,
    log: metrics.Log,
    terminal: metrics.Terminal,
  ):
    self._parts = parts
    self._saved = saved
    self._before = progress  # what earlier starts of this run had done
    self._reporter = reporter
    self._log = log
    self._terminal = terminal
    self._max_eval_batches = experiment.eval_batches
    self._eval_step = parts.learner.compile_eval_step()
    self._last_eval: tuple[int, float] | None = None

  def evaluate(self, step: int, state: state_lib.TrainState) -> None:
    """Records the validation loss of `state`."""
    values = evaluate.evaluate(
      self._eval_step,
      state.params,
      self._parts.eval_batches,
      put_batch=self._parts.learner.placement.put_batch,
      num_bytes_V=self._parts.tokenizer.num_bytes_V(),
      max_batches=self._max_eval_batches,
    )
    self._log.write('eval', step, values)
    self._last_eval = step, values['loss']
    self._terminal.say(
      f'step {step}: validation loss {values["loss"]:.4f} nats/token,'
      f' {values["bits_per_byte"]:.4f} bits/byte'
    )

  def save(self, step: int, state: state_lib.TrainState) -> None:
    """Starts to save a checkpoint of `state`."""
    evaluated_at, loss = self._last_eval or (None, None)
    tokens_seen = self._before.tokens_seen + self._reporter.tokens_seen
    self._saved.save(
      self._parts.learner.placement.whole(state),
      checkpoint.Progress(
        tokens_seen=tokens_seen,
        training_flops=tokens_seen * self._parts.learner.flops_per_token,
        train_seconds=self._before.train_seconds + self._reporter.train_seconds,
        data_state=self._parts.batches.get_state(),
      ),
      eval_loss=loss if evaluated_at == step else None,
    )
