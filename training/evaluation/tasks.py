"""Evaluation tasks of a run, measured while it trains.

They are the tasks of `evals/evaluate.py` that score text. Each score is
recorded with its standard error: two checkpoints that differ by less cannot be
told apart.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

from evals import evaluate, options as options_lib, ports
from evals.results import scores
from evals.tasks import task as task_lib
from text import tokenizer as tokenizer_lib
from training.evaluation import evals_config, model_port


def open_tasks(config: evals_config.EvalsConfig) -> tuple[task_lib.Task, ...]:
  """Reads the files of the tasks.

  Raises:
    FileNotFoundError, ValueError: a file is missing or has a wrong format.
  """

  def open_task(name: str) -> task_lib.Task:
    reads = evaluate.KINDS[name.partition(':')[0]].READS
    options = options_lib.Options(
      limit=config.limit, stride=config.stride if 'stride' in reads else 0
    )
    return evaluate.open_task(name, options)

  return tuple(map(open_task, config.tasks))


def measure(
  tasks: Sequence[task_lib.Task],
  scorer: model_port.Scorer,
  params: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  has_bos: bool,
  should_stop: Callable[[], bool] = lambda: False,
  frozen: tuple[Any, ...] = (),
) -> dict[str, float]:
  """Returns every score, and its standard error if it has one, by name.

  Args:
    has_bos: whether documents begin with BOS in training.
    should_stop: called before every batch; True raises.
    frozen: frozen_params of the state, if it has any.

  Raises:
    validation.Stopped: `should_stop` returned True.
    ValueError: an example of a task is longer than a row.
  """
  model = ports.Model(
    tokenizer=tokenizer,
    max_length=scorer.max_length,
    logprob_fn=scorer.logprob_fn(params, should_stop, frozen),
    adds_bos=has_bos,
    # A model trained without BOS knows EOS as the start of a document: EOS ends
    # the document before it.
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
  # A single example has no error, and a diverged model no finite perplexity.
  return {key: value for key, value in found.items() if math.isfinite(value)}


def report(values: dict[str, float]) -> str:
  """Returns the scores of `measure` as text."""
  parts = []
  for name, value in values.items():
    if name.endswith('_stderr'):
      continue
    error = values.get(f'{name}_stderr')
    parts.append(
      f'{name} {value:.4g}' + ('' if error is None else f' +- {error:.2g}')
    )
  return ', '.join(parts)
