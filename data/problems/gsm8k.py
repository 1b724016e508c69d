"""GSM8K in the form of conversations.

    python -m data.problems.gsm8k --path=gsm8k_train.jsonl \
      --out=gsm8k/train.jsonl --count=200
    python -m data.problems.gsm8k --path=gsm8k_test.jsonl \
      --out=gsm8k/validation.jsonl

    {"question": "...", "answer": "... <<9*2=18>>18 ...\\n#### 18"}
      -> {"messages": [
           {"role": "user", "content": "..."},
           {"role": "assistant", "content": "... 18 ...\\n#### 18"}]}

The notes of a calculator, <<9*2=18>>, are left out unless --notes is given: a
model without a calculator would have to write each result twice.

Reference: Cobbe et al. 2021 (arXiv:2110.14168).
"""

from collections.abc import Iterator
import itertools
import json
import pathlib
import re
import sys
from typing import Any

from absl import app, flags

from checks import expect, path_flags
from storage import atomic
from text.replies import answers

_NOTE = re.compile(r'<<[^<>]*>>')


def conversations(
  path: pathlib.Path, *, with_notes: bool = False
) -> Iterator[dict[str, Any]]:
  """Yields a record of a conversation for each line of a file of GSM8K.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not of GSM8K; the error names it.
  """
  with path.open(encoding='utf-8') as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        question, answer = _read(line, f'{path}, line {number}')
        if not with_notes:
          answer = _NOTE.sub('', answer)
        yield {
          'messages': [
            {'role': 'user', 'content': question},
            {'role': 'assistant', 'content': answer},
          ],
          'id': f'{path.stem}:{number}',
        }


def _read(line: str, place: str) -> tuple[str, str]:
  """Returns the question and the answer of a line."""
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(
      f'{place}: got {expect.shown(line)}, expected a JSON object ({error})'
    ) from None
  fields = record if isinstance(record, dict) else {}
  texts = [
    text.strip()
    for name in ('question', 'answer')
    if isinstance(text := fields.get(name), str) and text.strip()
  ]
  if len(texts) != 2:
    raise ValueError(
      f'{place}: got {expect.shown(record)}, expected an object with the texts'
      ' question and answer'
    )
  question, answer = texts
  _, mark, end = answer.partition(answers.MARK)
  if not mark or answers.value(end) is None:
    raise ValueError(
      f'{place}: answer: got {expect.shown(answer[-60:])}, expected a text that'
      f' ends with {answers.MARK} and a number'
    )
  return question, answer


def main(argv: list[str]) -> None:
  """Writes the file that the flags describe; errors are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  out = pathlib.Path(values.out)
  try:
    found = conversations(pathlib.Path(values.path), with_notes=values.notes)
    end = values.skip + values.count if values.count else None
    made = list(itertools.islice(found, values.skip, end))
    least = values.count or 1
    expect.at_least(
      f'conversations of {values.path} after the first {values.skip}',
      len(made),
      least,
      'lower --count or --skip',
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(each, ensure_ascii=False) + '\n' for each in made)
    atomic.write_text(out, text)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(f'wrote {len(made)} conversations to {out}')


if __name__ == '__main__':
  path_flags.DEFINE_path('path', None, 'JSONL file of GSM8K.', required=True)
  path_flags.DEFINE_path('out', None, 'JSONL file to write.', required=True)
  flags.DEFINE_integer('count', 0, 'Number of lines; 0: all.', 0)
  flags.DEFINE_integer('skip', 0, 'Lines to leave out at the start.', 0)
  flags.DEFINE_boolean('notes', False, 'Keep calculator notes, <<9*2=18>>.')
  app.run(main)
