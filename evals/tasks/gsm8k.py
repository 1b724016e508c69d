"""Word problems with a number as the answer, in the format of GSM8K.

    {"question": "...", "answer": "Janet sells ... <<9*2=18>>18 ...\\n#### 18"}

The right answer stands after '####'. `exact_match` reads the number after the
first '####' of a completion; the few-shot examples teach a model to write it.
`exact_match_last` reads the last number of a completion.

Reference: Cobbe et al. 2021 (arXiv:2110.14168).
"""

from collections.abc import Sequence
import dataclasses
import fractions
import functools
import os
import re
from typing import Self

from checks import paths
from evals import options as options_lib
from evals.tasks import generation, numbers, records
from storage import digests

_MARKED = re.compile(rf'####\s*({numbers.PATTERN})')
# A base model that has answered continues with another question.
STOP = ('Question:',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(generation.Task):
  """The kind `gsm8k`: completions are graded by their numbers."""

  READS = (*generation.Task.READS, 'num_fewshot', 'fewshot_path')

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the questions, and the solved examples if there are some."""
    fewshot = paths.expanded('fewshot_path', options.fewshot_path)
    prompts = read_prompts(path, fewshot, options.num_fewshot or 0)
    files = [each for each in (path, fewshot) if each]
    return cls(
      options=options,
      files={path: digests.of_file(path) for path in files},
      prompts=tuple(prompts),
    )


def read_prompts(
  path: str | os.PathLike,
  fewshot_path: str | os.PathLike = '',
  num_fewshot: int = 0,
) -> list[generation.Prompt]:
  """Returns the prompts of a file in the format of GSM8K.

  Args:
    fewshot_path: file of the same format. Its first examples stand, solved,
      before each question.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a line is wrong, or there are too few examples.
  """
  solved: list[tuple[str, str]] = []
  if num_fewshot:
    if not fewshot_path:
      raise ValueError(
        f'num_fewshot: got {num_fewshot} without a fewshot_path, expected a'
        ' file of solved examples, such as gsm8k_train.jsonl'
      )
    found = _records(fewshot_path)[:num_fewshot]
    if len(found) < num_fewshot:
      raise ValueError(
        f'{fewshot_path}: got {len(found)} examples, expected at least'
        f' num_fewshot = {num_fewshot}'
      )
    solved = [(each.text('question'), each.text('answer')) for each in found]
  return [_prompt(record, solved) for record in _records(path)]


def _records(path: str | os.PathLike) -> list[records.Record]:
  return records.read(
    path, required=('question', 'answer'), optional=('id', 'cluster')
  )


def _prompt(
  record: records.Record, solved: Sequence[tuple[str, str]]
) -> generation.Prompt:
  answer = record.text('answer')
  if marked_number(answer) is None:
    raise record.error('answer', "text that ends with '####' and a number")
  return generation.Prompt(
    id=record.id,
    text=prompt(record.text('question'), solved),
    grade=functools.partial(grade, answer),
    answer=answer,
    stop=STOP,
    cluster=record.text('cluster', ''),
  )


def prompt(question: str, solved: Sequence[tuple[str, str]] = ()) -> str:
  """Returns the prompt of a question, after (question, answer) examples."""
  parts = [f'Question: {q}\nAnswer: {a}\n\n' for q, a in solved]
  return f'{"".join(parts)}Question: {question}\nAnswer:'


def marked_number(text: str) -> fractions.Fraction | None:
  """Returns the number after the first '####', None if there is none."""
  match = _MARKED.search(text)
  return numbers.number(match.group(1)) if match else None


def grade(answer: str, completion: str) -> dict[str, float]:
  """Returns whether a completion is right, strictly and by its last number.

  Raises:
    ValueError: the answer has no number after '####'.
  """
  right = marked_number(answer)
  if right is None:
    raise ValueError(
      f"got the answer {answer[-60:]!r}, expected one that ends with '####' and"
      ' a number'
    )
  return {
    'exact_match': float(marked_number(completion) == right),
    'exact_match_last': float(numbers.last_number(completion) == right),
  }
