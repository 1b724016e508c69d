"""Rollout batches: the training batches of a policy that samples its own data.

    batches.refresh(step, state)   # a hook of the loop: draws when it is time
    batch = next(batches)          # rows of whole groups, B of them

They have the interface of `data.batches.TrainBatches`, so the loop and the step
do not know about sampling. A rollout batch is drawn by the weights after a
step, annotated by the trained model, and trained for `steps_per_rollout` steps.
With `rollouts.staleness`, older weights draw it, while steps run.
Its arrays are part of a checkpoint: a run that was stopped between two inner
epochs continues with the same rows, although their policy no longer exists.
"""

import base64
from collections.abc import Callable, Mapping
import io
import threading
from typing import Any
import zlib

import numpy as np

from data import row_order
from evals import sampling
from training import experiment as experiment_lib, state as state_lib
from training.rollouts import (
  prompt_source,
  rollout_config,
  rows as rows_lib,
)
from training.rollouts.draws import ahead, drawing

# (state, host arrays) -> arrays of `objective.annotated`
Annotate = Callable[[state_lib.TrainState, Mapping[str, np.ndarray]], Any]
# (step, drawn, arrays) -> None: for reports, before the first step on a batch
Tell = Callable[[int, drawing.Drawn, rows_lib.Arrays], None]
_ORDER = 7  # a stream of numbers of the seed, see `drawing.folded`


class RolloutBatches:
  """An endless iterator over batches that the policy samples."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    drawer: drawing.Drawer,
    *,
    pad_id: int,
    sampler: sampling.Sampler,
    turn: threading.Lock,
    weights_of: Callable[[state_lib.TrainState], Any],
    annotate: Annotate | None,
  ):
    """Starts before the first step, without rows.

    Args:
      drawer: draws the episodes.
      pad_id: padding id of the tokenizer.
      sampler: sampler of the run; it gets the weights of a state at each
        refresh.
      turn: held while the sampler works.
      weights_of: returns the variables of the model that a state trains.
      annotate: the learner's function; None: the objective annotates nothing.
    """
    config = experiment.rollouts
    assert config is not None
    self._experiment, self._drawer = experiment, drawer
    self._pad_id, self._sampler = pad_id, sampler
    self._draws = ahead.Draws(
      drawer, sampler, staleness=config.staleness, turn=turn
    )
    self._weights_of, self._annotate = weights_of, annotate
    self._batch_size = experiment.data.batch_size
    self.steps_per_rollout = config.steps_per_rollout(
      drawer.group_size, self._batch_size
    )
    self._step = 0  # number of batches taken
    self._index = -1  # index of the rollout batch whose rows are below
    self._arrays: rows_lib.Arrays = {}
    self.tell: Tell = lambda step, drawn, arrays: None
    # A saved position is valid only with these settings.
    self._settings = {
      'seed': experiment.seed,
      'row_length': experiment.data.row_length,
      'prompts': drawer.prompts.digest,
      'group_size': drawer.group_size,
      'steps_per_rollout': self.steps_per_rollout,
      'batch_size': self._batch_size,
    }

  @property
  def sources(self) -> tuple[prompt_source.PromptSource, ...]:
    """Returns the prompts of the run."""
    return (prompt_source.PromptSource(self._drawer.prompts),)

  def refresh(self, step: int, state: state_lib.TrainState) -> None:
    """Takes the rollout batch of the next steps, if it is not there yet.

    Batches that are drawn ahead begin here, and the next one is waited for.

    A hook of the loop. Idempotent: a run that resumes calls it once more.

    Args:
      step: steps that `state` has taken.
      state: its weights sample, now or ahead, and annotate.
    """
    index = step // self.steps_per_rollout
    if index == self._index or step >= self._experiment.num_steps:
      return
    if step % self.steps_per_rollout:
      raise ValueError(
        f'rollouts: got no rows of the rollout batch {index} at step {step},'
        ' expected the rows that its checkpoint holds; the checkpoint is'
        ' damaged: resume from an earlier one'
      )
    last = -(-self._experiment.num_steps // self.steps_per_rollout) - 1
    self._draws.ask(index, step, lambda: self._weights_of(state), last=last)
    drawn = self._draws.take(index)
    self._arrays = self._rows(drawn, state)
    self._index = index
    self.tell(step, drawn, self._arrays)

  def _rows(
    self, drawn: drawing.Drawn, state: state_lib.TrainState
  ) -> rows_lib.Arrays:
    """Returns the arrays of all episodes of a rollout batch, annotated."""
    objective, config = self._experiment.objective, self._experiment.rollouts
    assert config is not None
    advantages_N = np.zeros(len(drawn.episodes), np.float32)
    made_here = set(objective.batch_spec()) - set(objective.annotated)
    if 'advantages' in made_here:
      # Only some objectives have a recipe of advantages.
      recipe: Any = getattr(objective, 'advantages', None)
      advantages_N = recipe(drawn.scored.total_N)
    arrays = rows_lib.rows_of(
      drawn.episodes,
      row_length=self._experiment.data.row_length,
      pad_id=self._pad_id,
      # Compares sampler and trainer, where both log-probabilities are known.
      names=made_here | {'sampler_logprobs', 'versions'},
      rewards_N=drawn.scored.total_N,
      advantages_N=advantages_N,
      masks_truncated=config.masks_truncated,
    )
    if self._annotate is not None and objective.annotated:
      arrays |= self._annotate(state, arrays)
    return arrays

  def __iter__(self) -> 'RolloutBatches':
    return self

  def __next__(self) -> rows_lib.Arrays:
    index, place = divmod(self._step, self.steps_per_rollout)
    if index != self._index:
      raise RuntimeError(
        f'rollouts: got no rows for step {self._step}, expected `refresh` to'
        ' have drawn them; report this as a bug'
      )
    rows = self._order(index, place)
    self._step += 1
    wanted = self._experiment.objective.batch_spec()
    return {name: self._arrays[name][rows] for name in wanted}

  def _order(self, index: int, place: int) -> np.ndarray:
    """Returns the rows of a step: whole groups, shuffled in each epoch."""
    size = self._drawer.group_size
    num_groups = len(self._arrays['tokens']) // size
    per_step = self._batch_size // size
    places = np.arange(place * per_step, (place + 1) * per_step)
    seed = drawing.folded(self._experiment.seed, _ORDER, index)
    groups = row_order.shuffled(places, num_groups, seed)
    return (groups[:, None] * size + np.arange(size)).reshape(-1)

  def epochs(self, num_steps: int) -> dict[str, float]:
    """Returns how often each prompt was drawn in `num_steps` steps."""
    config, prompts = self._experiment.rollouts, self._drawer.prompts
    assert config is not None
    drawn = -(-num_steps // self.steps_per_rollout) * config.num_prompts
    return {prompts.name: drawn / len(prompts)}

  def seek(self, step: int) -> None:
    """Sets the iterator to the batch of `step`, without rows."""
    self._step, self._index, self._arrays = step, -1, {}

  def get_state(self) -> dict[str, Any]:
    """Returns the position and the rows that are being trained on, as JSON."""
    return {
      'settings': self._settings,
      'step': self._step,
      'index': self._index,
      'rows': _packed(self._arrays),
      'ahead': self._draws.get_state(),
      'phases': [{'from_row': 0, 'weights': [1.0], 'taken': [0]}],
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from `state`, with bit-identical batches.

    Raises:
      ValueError: `state` was saved with other settings or other prompts.
    """
    for name, value in self._settings.items():
      if (saved := state['settings'].get(name)) != value:
        raise ValueError(
          f'the saved rollouts have {name} {saved!r}, this run has {value!r};'
          ' continue with the saved value, or start a new workdir'
        )
    self._step, self._index = state['step'], state['index']
    self._arrays = _unpacked(state['rows'])
    # Checkpoints from before there was a staleness have none.
    self._draws.set_state(state.get('ahead', []))

  def close(self) -> None:
    """Frees the sampler, after the batch that is being drawn."""
    self._draws.close()
    self._sampler.close()


def _packed(arrays: rows_lib.Arrays) -> str:
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
  return base64.b64encode(zlib.compress(buffer.getvalue(), 1)).decode()


def _unpacked(text: str) -> rows_lib.Arrays:
  data = zlib.decompress(base64.b64decode(text))
  with np.load(io.BytesIO(data)) as found:
    return {name: found[name] for name in found.files}


def group_size_of(experiment: experiment_lib.Experiment) -> int:
  """Returns the number of answers to one prompt that a run compares."""
  return rollout_config.group_size_of(experiment.objective)
