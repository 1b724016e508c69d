"""Tasks of the LM Evaluation Harness, run on a model of this project.

Needs lm_eval (requirements-eval.txt). lm_eval computes the scores. If a score
is a mean over examples, or a ratio of sums, the values of the examples are kept
too, so that two results can be compared example by example.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

from lm_eval import evaluator, tasks as tasks_lib

from evals import ports
from evals.harness import lm_eval_adapter
from evals.results import scores, statistics

# Resamples for the errors of scores that lm_eval can only bootstrap.
_BOOTSTRAP_ITERS = 1000
# Relative difference by rounding: lm_eval adds examples up in another order.
_ROUNDING = 1e-9
# Scores of lm_eval that are exp(-sum of log-probabilities / sum of weights).
_EXPONENTIALS = ('word_perplexity', 'byte_perplexity', 'perplexity')


def open_tasks(
  names: Sequence[str],
  *,
  limit: int | None = None,
  num_fewshot: int | None = None,
  seed: int = 0,
  is_chat: bool = False,
) -> Callable[[ports.Model], tuple[scores.Group, ...]]:
  """Finds tasks and returns a function that runs them on a model.

  Args:
    names: tasks, groups or tags of lm_eval, or paths of YAML files.
    num_fewshot: solved examples before each question; None: as the task says.

  Raises:
    ValueError: there is no such task.
  """
  are_files = all(name.endswith(('.yaml', '.yml')) for name in names)
  # The index of all tasks takes ten seconds to read, and YAML files need none.
  manager = tasks_lib.TaskManager(include_defaults=not are_files)
  try:
    loaded = manager.load(list(names))
  except (KeyError, FileNotFoundError) as error:
    raise ValueError(
      f'lm_eval: got {", ".join(names)}, expected names of its tasks, see'
      f' python -m lm_eval ls tasks, or paths of YAML files: {error}'
    ) from None
  leaves = list(loaded['tasks'])

  def measure(model: ports.Model) -> tuple[scores.Group, ...]:
    results = evaluator.simple_evaluate(
      model=lm_eval_adapter.LM(model, seed=seed),
      tasks=list(names),
      task_manager=manager,
      limit=limit,
      num_fewshot=num_fewshot,
      bootstrap_iters=_BOOTSTRAP_ITERS,
      apply_chat_template=is_chat,
      random_seed=seed,
      numpy_random_seed=seed,
      torch_random_seed=seed,
      fewshot_random_seed=seed,
    )
    # lm_eval returns None in all processes but the first; this is the only one.
    assert results is not None
    return groups_of(results, leaves)

  return measure


def groups_of(
  results: Mapping[str, Any], leaves: Sequence[str]
) -> tuple[scores.Group, ...]:
  """Returns the scores of lm_eval: a group per task, filter and aggregate.

  Args:
    results: return value of `lm_eval.simple_evaluate`.
    leaves: names of the tasks that have examples of their own.
  """
  found = []
  for task, metrics in results['results'].items():
    better = results['higher_is_better'].get(task, {})
    samples = results['samples'].get(task, []) if task in leaves else []
    for filter_name in _filters(metrics):
      mine = [s for s in samples if s['filter'] == filter_name]
      group = _group(task, filter_name, metrics, better, mine)
      if group.scores:
        found.append(group)
  return tuple(found)


def _filters(metrics: Mapping[str, Any]) -> list[str]:
  """Returns the names of the answer filters of a task, in order."""
  names = [key.split(',', 1)[1] for key in metrics if ',' in key]
  return list(dict.fromkeys(names))


def _group(task, filter_name, metrics, better, samples) -> scores.Group:
  found = []
  for key, value in metrics.items():
    metric, _, of_filter = key.partition(',')
    if of_filter != filter_name or metric.endswith('_stderr'):
      continue
    if not isinstance(value, int | float):
      continue
    error = metrics.get(f'{metric}_stderr,{filter_name}')
    found.append(
      _score(
        metric,
        float(value),
        float(error) if isinstance(error, int | float) else math.nan,
        bool(better.get(metric, True)),
        [sample[metric] for sample in samples if metric in sample],
      )
    )
  return scores.Group(
    name=task if filter_name == 'none' else f'{task},{filter_name}',
    scores=tuple(found),
    num_examples=len(samples) or int(metrics.get('sample_len') or 0),
    example_ids=tuple(
      f'{sample["doc_id"]}:{sample["doc_hash"][:12]}' for sample in samples
    ),
    examples=tuple(
      {
        'id': sample['doc_id'],
        'target': sample['target'],
        'answers': sample['filtered_resps'],
      }
      for sample in samples
    ),
  )


def _score(metric, value, error, is_better, parts) -> scores.Score:
  """Returns a score, with one value per example if it is their mean."""
  values = _values(metric, value, parts)
  if not values:
    return scores.Score(
      name=metric, value=value, standard_error=error, higher_is_better=is_better
    )
  return scores.of_values(
    metric,
    values,
    higher_is_better=is_better,
    per='word' if metric.startswith('word') else 'example',
    is_exponential=metric in _EXPONENTIALS,
  )


def _values(metric: str, value: float, parts: list[Any]) -> list[float]:
  """Returns values whose mean is the score, or its logarithm; [] if unknown.

  lm_eval does not say how a metric combines the parts of its examples. So this
  function tries a mean and a ratio of sums, and keeps the values only if they
  give the score that lm_eval reports.
  """
  if not parts:
    return []
  is_exponential = metric in _EXPONENTIALS
  if all(isinstance(part, bool | int | float) for part in parts):
    sign = -1.0 if is_exponential else 1.0
    values = [sign * float(part) for part in parts]
  elif all(_is_weighted(part) for part in parts):
    logprobs, weights = zip(*parts, strict=True)
    if not all(weight > 0 for weight in weights):
      return []
    scale = 1.0 if is_exponential else math.log(2)
    ratios = statistics.ratio_values([-x for x in logprobs], weights)
    values = (ratios / scale).tolist()
  else:
    return []
  mean = math.fsum(values) / len(values)
  made = math.exp(mean) if is_exponential else mean
  is_same = math.isclose(made, value, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
  return values if is_same else []


def _is_weighted(part: Any) -> bool:
  return (
    isinstance(part, list | tuple)
    and len(part) == 2
    and all(isinstance(x, int | float) for x in part)
  )
