"""Answers that are numbers, in the format of GSM8K.

    {"question": "...", "answer": "Janet sells ... <<9*2=18>>18 ...\\n#### 18"}

The right answer stands after '####'. Of a completion, `exact_match` reads the
number after its first '####', as the few-shot examples teach a model to write,
and `exact_match_last` the last number anywhere.

Reference: Cobbe et al. 2021 (arXiv:2110.14168).
"""

from collections.abc import Sequence
import decimal
import re

# With thousands separators or without; a sign, a decimal part.
_NUMBER = r'-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+'
_MARKED = re.compile(rf'####\s*({_NUMBER})')
_ANY = re.compile(_NUMBER)
# What a base model writes once it has answered: the next question.
STOP = ('Question:',)


def prompt(question: str, solved: Sequence[tuple[str, str]] = ()) -> str:
  """Returns what a model is asked, after (question, answer) examples."""
  parts = [f'Question: {q}\nAnswer: {a}\n\n' for q, a in solved]
  return f'{"".join(parts)}Question: {question}\nAnswer:'


def marked_number(text: str) -> decimal.Decimal | None:
  """Returns the number after the first '####', None if there is none."""
  match = _MARKED.search(text)
  return number(match.group(1)) if match else None


def last_number(text: str) -> decimal.Decimal | None:
  """Returns the last number of a text, None if there is none.

  A hyphen is a sign unless it joins: '5-3' ends in 3, 'is -3' in -3.
  """
  matches = list(_ANY.finditer(text))
  if not matches:
    return None
  found, start = matches[-1].group(), matches[-1].start()
  if found[0] == '-' and start and re.match(r'[\w)]', text[start - 1]):
    found = found[1:]
  return number(found)


def number(text: str) -> decimal.Decimal | None:
  """Returns the number that a text is, None if it is none.

  '$1,200.50', ' 18. ', '18.0' and '18%' are numbers; equal ones compare equal
  however they are written.
  """
  stripped = text.strip().rstrip('.').strip()
  stripped = re.sub(r'[$,%]', '', stripped)
  try:
    value = decimal.Decimal(stripped)
  except decimal.InvalidOperation:
    return None
  return value if value.is_finite() else None


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
    'exact_match_last': float(last_number(completion) == right),
  }
