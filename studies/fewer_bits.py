"""The scores of a model in tasks, before and after it was quantised.

    python -m studies.fewer_bits --original=FROZEN --quantised=DIR,DIR \
      --tasks=choice:arc.jsonl,gsm8k:test.jsonl --workdir=runs/bits

Perplexity and KL say how far a quantised model is from its original; tasks say
whether its users notice. Every model answers every task through the engine
that serves, greedily. The answers of two models to one question are a pair, so
that the difficulty of a question cancels: McNemar's test for shares, a paired
t-test for other means (`evals/results/statistics.py`). The table has

    score       of the original and of the quantised model
    difference  quantised less original, with its 95 % interval
    p           probability of such a difference if there is none

The results stay in --workdir: the same command measures what is missing, and
`python -m evals.compare A.json B.json` compares any two of them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import sys

from absl import app, flags

from checks import path_flags, paths
from evals import evaluate, options as options_lib
from evals.results import report, scores, statistics
from evals.tasks import task as task_lib
from frozen import format as frozen_format, manifest as manifest_lib
from frozen.quantize import quality
from storage import atomic
from studies.common import answered, study_flags

ORIGINAL = 'original'


def result_of(
  model: pathlib.Path,
  task: str,
  options: options_lib.Options,
  out: pathlib.Path,
) -> scores.Result:
  """Returns the result of a model in a task, measured once.

  Args:
    model: frozen directory.
    task: as for `evals.evaluate.run`.
    options: options of the evaluation that the task reads.
    out: file of the result; read if the weights, the files of the task and the
      options are the same.

  Raises:
    FileNotFoundError: there is no such model, or a file of the task is missing.
    ValueError: the task is wrong, or the model cannot do it.
  """
  opened = evaluate.open_task(task, options)
  digest = manifest_lib.read(model).weights_digest
  if out.exists() and _is_of(found := scores.load(out), digest, opened):
    return found
  result = opened.run(answered.open_model(model))
  result.save(out)
  return scores.load(out)


def _is_of(found: scores.Result, digest: str, task: task_lib.Task) -> bool:
  """Returns whether a saved result is of these weights and this task."""
  options = {
    name: value
    for name, value in dataclasses.asdict(task.options).items()
    if not isinstance(value, str)  # saved paths have no directories
  }
  return (
    digest in found.model.values()
    and set(found.files.values()) == set(task.files.values())
    and all(found.options.get(name) == options[name] for name in options)
  )


def differences(
  original: scores.Result, quantised: scores.Result
) -> list[tuple[str, scores.Score, scores.Score, statistics.Difference]]:
  """Returns name, both scores and their paired difference, for each score.

  Scores that are no mean over examples have no pairs, and are left out.

  Raises:
    ValueError: the models have not answered the same questions.
  """
  found = []
  for group, other in zip(original.groups, quantised.groups, strict=True):
    if group.example_ids != other.example_ids:
      raise ValueError(
        f'{group.name}: got two results of different examples, expected the'
        ' same ones; delete the files of --workdir and measure again'
      )
    for score in group.scores:
      again = other.score(score.name)
      if not score.values or len(score.values) != len(again.values):
        continue
      paired = statistics.compare(score.values, again.values, group.clusters)
      found.append((f'{group.name} / {score.name}', score, again, paired))
  return found


def table(results: Mapping[str, Sequence[scores.Result]]) -> str:
  """Returns the table as Markdown.

  Args:
    results: results of all tasks by name of the model, `ORIGINAL` first.
  """
  lines = [
    '| model | task / score | original | quantised | difference, 95 % | p |',
    '|---|---|---|---|---|---|',
  ]
  base = results[ORIGINAL]
  for name, others in results.items():
    if name == ORIGINAL:
      continue
    for before, after in zip(base, others, strict=True):
      for of_what, old, new, paired in differences(before, after):
        # Of a perplexity, the mean over examples is its logarithm.
        what = 'log: ' if old.is_exponential else ''
        lines.append(
          f'| {name} | {of_what} | {old.value:.4g} | {new.value:.4g} |'
          f' {what}{paired.value:+.4g} [{paired.low:+.4g},'
          f' {paired.high:+.4g}] | {paired.p_value:.3f} |'
        )
  return '\n'.join(lines)


def _named(place: pathlib.Path, taken: set[str]) -> str:
  """Returns the name of a model: its directory, and the one above if taken."""
  name = place.resolve().name
  if name in taken or name == 'frozen':
    name = f'{place.resolve().parent.name}/{name}'
  if name in taken or name == ORIGINAL:
    raise ValueError(
      f'--quantised: got {place}, whose name is that of another directory,'
      ' expected different names; rename one'
    )
  return name


def measure(
  original: pathlib.Path,
  quantised: Sequence[pathlib.Path],
  tasks: Sequence[str],
  options: options_lib.Options,
  workdir: pathlib.Path,
) -> dict[str, list[scores.Result]]:
  """Returns the results of all models in all tasks; arguments as the flags.

  Raises:
    FileNotFoundError, ValueError: see `result_of`; or a model was not made of
      the original.
  """
  models = {ORIGINAL: original}
  for place in quantised:
    models[_named(place, set(models))] = place
  digest = frozen_format.open_directory(original).manifest.weights_digest
  for place in quantised:
    lineage = frozen_format.open_directory(place).manifest.lineage
    source = lineage.get('quantised_from')
    if source is None:
      print(f'{place} does not record its original; --original is taken')
    elif source != digest:
      raise ValueError(
        f'--quantised: got {place}, made of the weights {source}, expected'
        f' {digest} of --original'
      )
  for task in tasks:
    evaluate.open_task(task, options)  # wrong files are refused at once
  atomic.make_directory(workdir)
  found: dict[str, list[scores.Result]] = {}
  for name, place in models.items():
    told = quality.told(manifest_lib.read(place))
    print(f'{name}: {told or "no quality table"}', flush=True)
    found[name] = [
      result_of(
        place,
        task,
        options,
        workdir / f'{name.replace("/", "_")}.{i}.{task.partition(":")[0]}.json',
      )
      for i, task in enumerate(tasks)
    ]
    for result in found[name]:
      print(report.text(result), flush=True)
  return found


def main(argv: list[str]) -> None:
  """Measures what is missing, and prints the table; errors are one line."""
  workdir = study_flags.begin(argv)
  values = flags.FLAGS
  try:
    for name in ('original', 'quantised', 'tasks'):
      if not values[name].value:
        raise ValueError(f'--{name}: got none, expected one at least')
    results = measure(
      pathlib.Path(values.original),
      [
        pathlib.Path(paths.expanded('--quantised', place))
        for place in values.quantised
      ],
      values.tasks,
      options_lib.Options(limit=values.limit),
      workdir,
    )
    print(table(results))
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _define_flags() -> None:
  path_flags.DEFINE_path('original', '', 'Frozen directory in floats.')
  flags.DEFINE_list(
    'quantised', [], 'Frozen directories that were made of it in fewer bits.'
  )
  flags.DEFINE_list(
    'tasks', [], 'Tasks as of `serve.py --eval`, such as choice:FILE.jsonl.'
  )
  flags.DEFINE_integer(
    'limit', 0, 'First examples of each task; 0: all.', lower_bound=0
  )


if __name__ == '__main__':
  _define_flags()
  app.run(main)
