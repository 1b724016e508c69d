"""Tasks that a run is measured by while it trains, besides its validation loss.

They are those of `evals/run.py` that score text. Each score is recorded with
its standard error: of two checkpoints that differ by less, nobody knows which
is better.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

from evals import options as options_lib, ports, run as evals_run
from evals.results import scores
from evals.tasks import task as task_lib
from text import tokenizer as tokenizer_lib
from training.evaluation import evals_config, model_port


def open_tasks(config: evals_config.EvalsConfig) -> tuple[task_lib.Task, ...]:
  """Reads the files of the tasks.

  Raises:
    FileNotFoundError, ValueError: a file is missing, or not what it should be.
  """
  opened = []
  for task in config.tasks:
    options = options_lib.Options(
      limit=config.limit,
      stride=config.stride if task.startswith('perplexity:') else 0,
    )
    opened.append(evals_run.open_task(task, options))
  return tuple(opened)


def measure(
  tasks: Sequence[task_lib.Task],
  scorer: model_port.Scorer,
  params: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  has_bos: bool,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
  """Returns every score, and its standard error where there is one.

  Args:
    tasks: from `open_tasks`.
    scorer: of the run.
    params: the model's variables, placed on the devices.
    tokenizer: of the run.
    has_bos: documents begin with BOS in training.
    should_stop: asked before every batch.

  Raises:
    evaluate.Stopped: the run was asked to stop.
    ValueError: a task cannot be asked.
  """
  model = ports.Model(
    tokenizer=tokenizer,
    max_length=scorer.max_length,
    logprob_fn=scorer.logprob_fn(params, should_stop),
    adds_bos=has_bos,
    # A model that never saw BOS knows EOS: another document ended there.
    prefix_id=tokenizer.bos_id if has_bos else tokenizer.eos_id,
  )
  values = {}
  for task in tasks:
    for score in task.run(model).groups[0].scores:
      values |= _recorded(evals_config.name_of(task.name), score)
  return values


def _recorded(name: str, score: scores.Score) -> dict[str, float]:
  found = {
    f'{name}/{score.name}': score.value,
    f'{name}/{score.name}_stderr': score.standard_error,
  }
  # Of one example there is no error; of a model gone wild no perplexity.
  return {key: value for key, value in found.items() if math.isfinite(value)}


def report(values: dict[str, float]) -> str:
  """Returns what `measure` found in words."""
  parts = []
  for name, value in values.items():
    if name.endswith('_stderr'):
      continue
    error = values.get(f'{name}_stderr')
    parts.append(
      f'{name} {value:.4g}' + ('' if error is None else f' +- {error:.2g}')
    )
  return ', '.join(parts)
