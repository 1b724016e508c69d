"""Evaluations by name: `run` is the one function that others call.

    result = run.run('perplexity:book.txt', model)

`KINDS` lists the kinds of evaluation. The module of each kind describes its
files; evals/tasks/records.py describes the common form of JSON Lines.
"""

from collections.abc import Mapping
import dataclasses

from checks import expect, paths
from evals import options as options_lib, ports
from evals.harness import lm_eval_kind
from evals.results import scores
from evals.tasks import (
  generation,
  gsm8k,
  judge,
  multiple_choice,
  perplexity,
  task as task_lib,
  verify,
)

KINDS: Mapping[str, type[task_lib.Task]] = {
  'perplexity': perplexity.Task,  # FILE: perplexity and bits per byte of a text
  'choice': multiple_choice.Task,  # FILE.jsonl: the most probable answer
  'generate': generation.Task,  # FILE.jsonl: completions that must match
  'gsm8k': gsm8k.Task,  # FILE.jsonl: word problems in the format of GSM8K
  'verify': verify.Task,  # FILE.jsonl: answers that a rule gives a score
  'judge': judge.Task,  # FILE.jsonl: which of two answers is better
  # TASK[,TASK]: any task of the LM Evaluation Harness, or its YAML file.
  'lm_eval': lm_eval_kind.Task,
}


def run(
  name: str, model: ports.Model, options: options_lib.Options | None = None
) -> scores.Result:
  """Returns the scores of a model in a task.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the task, a file or an option is wrong, or the model lacks a
      function that the task needs.
    ModuleNotFoundError: lm_eval is not installed.
  """
  return open_task(name, options).run(model)


def open_task(
  name: str, options: options_lib.Options | None = None
) -> task_lib.Task:
  """Reads the files of a task; raises like `run`, before a model is asked."""
  options = options or options_lib.Options()
  kind, _, path = name.partition(':')
  if kind not in KINDS or not path:
    raise ValueError(
      f'task: got {name!r}, expected KIND:FILE, where KIND is one of'
      f' {", ".join(KINDS)}, as in perplexity:book.txt'
      f'{expect.meant(kind, KINDS)}'
    )
  path = paths.expanded('task', path)
  _check_read(kind, options)
  return dataclasses.replace(KINDS[kind].read(path, options), name=name)


def _check_read(kind: str, options: options_lib.Options) -> None:
  """Refuses an option that the task would ignore."""
  for field in dataclasses.fields(options):
    got = getattr(options, field.name)
    if got != field.default and field.name not in KINDS[kind].READS:
      readers = [each for each in KINDS if field.name in KINDS[each].READS]
      raise ValueError(
        f'{field.name}: got {got!r} with a task of kind {kind}, expected it'
        f' only with {", ".join(readers)}; leave it out'
      )
