"""Tasks from files: JSON Lines, an object per line, blank lines left out.

    perplexity  FILE.jsonl: {"text": "..."}; any other file is one text
    choice      {"context": "...", "choices": ["...", "..."], "label": 0}
    generate    {"prompt": "...", "answer": "..." or ["...", "..."]}
    gsm8k       {"question": "...", "answer": "... #### 18"}

Further fields, which may be left out:

    id         names the example in results; its line and content otherwise
    cluster    examples of one cluster may err together: one passage, one author
    delimiter  choice: between context and choice; a space otherwise
    stop       generate: strings, any of which ends the completion
    match      generate: exact (the whole text) or number (the last number)

A field of another name is an error, and errors name file and line.
"""

from collections.abc import Callable, Sequence
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from evals.tasks import generation, gsm8k, multiple_choice

_REQUIRED = {
  'choice': ('context', 'choices', 'label'),
  'generate': ('prompt', 'answer'),
  'gsm8k': ('question', 'answer'),
  'perplexity': ('text',),
}
_OPTIONAL = {
  'choice': ('id', 'cluster', 'delimiter'),
  'generate': ('id', 'cluster', 'stop', 'match'),
  'gsm8k': ('id', 'cluster'),
  'perplexity': ('id',),
}


class _Record(NamedTuple):
  """A line of a file."""

  place: str  # 'FILE, line N'
  id: str
  fields: dict[str, Any]

  def error(self, name: str, expected: str) -> ValueError:
    got = repr(self.fields.get(name))
    return ValueError(
      f'{self.place}: {name}: got {got[:80]}, expected {expected}'
    )

  def text(self, name: str, default: str | None = None) -> str:
    """Returns a field that is a string."""
    value = self.fields.get(name, default)
    if not isinstance(value, str):
      raise self.error(name, 'a string')
    return value

  def texts(self, name: str, least: int) -> tuple[str, ...]:
    """Returns a field that is a list of non-empty strings."""
    value = self.fields.get(name, [])
    if (
      not isinstance(value, list)
      or len(value) < least
      or not all(isinstance(item, str) and item for item in value)
    ):
      raise self.error(
        name, f'a list of at least {least} strings, none of them empty'
      )
    return tuple(value)


def read_documents(path: str | os.PathLike) -> list[str]:
  """Returns the texts of a file: one of any file, each line's of a .jsonl.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is no UTF-8, has no text, or a line is wrong.
  """
  if pathlib.Path(path).suffix == '.jsonl':
    documents = [r.text('text') for r in _records(path, 'perplexity')]
  else:
    documents = [_read(pathlib.Path(path))]
  if not any(documents):
    raise ValueError(f'{path}: got no text, expected some')
  return documents


def read_choices(path: str | os.PathLike) -> list[multiple_choice.Question]:
  """Returns the questions of a file of the kind `choice`.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or there is none.
  """
  return [_question(record) for record in _records(path, 'choice')]


def _question(record: _Record) -> multiple_choice.Question:
  choices = record.texts('choices', 2)
  label = record.fields['label']
  if (
    not isinstance(label, int)
    or isinstance(label, bool)
    or not 0 <= label < len(choices)
  ):
    raise record.error(
      'label', f'an integer from 0 to {len(choices) - 1}: which choice is right'
    )
  return multiple_choice.Question(
    id=record.id,
    context=record.text('context'),
    choices=choices,
    label=label,
    delimiter=record.text('delimiter', ' '),
    cluster=record.text('cluster', ''),
  )


def read_prompts(path: str | os.PathLike) -> list[generation.Prompt]:
  """Returns the prompts of a file of the kind `generate`.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or there is none.
  """
  return [_prompt(record) for record in _records(path, 'generate')]


def _prompt(record: _Record) -> generation.Prompt:
  if isinstance(record.fields['answer'], str):
    answers = (record.text('answer'),)
  else:
    answers = record.texts('answer', 1)
  match = record.text('match', 'exact')
  if match not in generation.MATCHES:
    raise record.error('match', f'one of {", ".join(generation.MATCHES)}')
  if not record.text('prompt'):
    raise record.error('prompt', 'text')
  try:
    grade = generation.exact_match(answers, match)
  except ValueError as error:
    raise ValueError(f'{record.place}: {error}') from None
  return generation.Prompt(
    id=record.id,
    text=record.text('prompt'),
    grade=grade,
    answer=' | '.join(answers),
    stop=record.texts('stop', 0),
    cluster=record.text('cluster', ''),
  )


def read_gsm8k(
  path: str | os.PathLike,
  fewshot_path: str | os.PathLike = '',
  num_fewshot: int = 0,
) -> list[generation.Prompt]:
  """Returns the prompts of a file in the format of GSM8K.

  Args:
    path: what is asked.
    fewshot_path: a file of the same format whose first examples stand, solved,
      before each question.
    num_fewshot: how many.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or there are too few.
  """
  solved: list[tuple[str, str]] = []
  if num_fewshot:
    if not fewshot_path:
      raise ValueError(
        f'num_fewshot: got {num_fewshot} without a fewshot_path, expected a'
        ' file of solved examples, such as gsm8k_train.jsonl'
      )
    records = _records(fewshot_path, 'gsm8k')[:num_fewshot]
    if len(records) < num_fewshot:
      raise ValueError(
        f'{fewshot_path}: got {len(records)} examples, expected at least'
        f' num_fewshot = {num_fewshot}'
      )
    solved = [(r.text('question'), r.text('answer')) for r in records]
  return [_word_problem(record, solved) for record in _records(path, 'gsm8k')]


def _word_problem(
  record: _Record, solved: Sequence[tuple[str, str]]
) -> generation.Prompt:
  answer = record.text('answer')
  if gsm8k.marked_number(answer) is None:
    raise record.error('answer', "text that ends with '####' and a number")
  return generation.Prompt(
    id=record.id,
    text=gsm8k.prompt(record.text('question'), solved),
    grade=_gsm8k_grade(answer),
    answer=answer,
    stop=gsm8k.STOP,
    cluster=record.text('cluster', ''),
  )


def _gsm8k_grade(answer: str) -> Callable[[str], dict[str, float]]:
  return lambda completion: gsm8k.grade(answer, completion)


def _records(path: str | os.PathLike, kind: str) -> list[_Record]:
  """Returns the lines of a file, each with the fields of its kind."""
  path = pathlib.Path(path)
  records, seen = [], {}
  for i, line in enumerate(_read(path).split('\n'), 1):
    if not line.strip():
      continue
    record = _record(f'{path}, line {i}', line, i, kind)
    if record.id in seen:
      raise record.error('id', f'another than that of {seen[record.id]}')
    seen[record.id] = f'line {i}'
    records.append(record)
  if not records:
    raise ValueError(f'{path}: got no lines, expected at least one example')
  return records


def _record(place: str, line: str, number: int, kind: str) -> _Record:
  required, optional = _REQUIRED[kind], _OPTIONAL[kind]
  try:
    fields = json.loads(line)
  except ValueError as error:
    raise ValueError(
      f'{place}: got {line[:60]!r}, expected a JSON object ({error})'
    ) from None
  if not isinstance(fields, dict):
    raise ValueError(f'{place}: got {line[:60]!r}, expected a JSON object')
  missing = [name for name in required if name not in fields]
  unknown = [name for name in fields if name not in (*required, *optional)]
  if missing or unknown:
    raise ValueError(
      f'{place}: got the fields {", ".join(fields) or "none"}, expected'
      f' {", ".join(required)} and no others but {", ".join(optional)}'
    )
  name = fields.get('id', f'{number}:{_digest(line)}')
  if not isinstance(name, str | int):
    raise ValueError(f'{place}: id: got {name!r}, expected text or a number')
  return _Record(place, str(name), fields)


def _digest(line: str) -> str:
  return hashlib.sha256(line.strip().encode('utf-8')).hexdigest()[:12]


def _read(path: pathlib.Path) -> str:
  """Returns the text of a file as it is, line ends included."""
  try:
    return path.read_bytes().decode('utf-8')
  except FileNotFoundError:
    raise FileNotFoundError(
      f'{path}: got no such file, expected one of examples'
    ) from None
  except IsADirectoryError:
    raise ValueError(f'{path}: got a directory, expected a file') from None
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b'\n') + 1
    raise ValueError(
      f'{path}, line {line}: got bytes that are no UTF-8, expected text;'
      ' convert the file'
    ) from None
