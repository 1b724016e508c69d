r"""Answers, compared by their value and not by their spelling.

    answer = Answer('number', '1000')
    is_right(answer, 'It costs $1,000.00 in all.\n#### $1,000')      # True
    is_right(Answer('number', '3/4'), 'So the share is \\frac{6}{8}.')  # True

A completion gives its answer after the first '####', as in GSM8K: a model that
continues with another question has answered this one. Without this mark, the
last '\boxed{...}' or 'the answer is ...' counts, and else the last value.

Reference: Cobbe et al. 2021 (arXiv:2110.14168) for '####'.
"""

from collections.abc import Iterator
import dataclasses
import fractions
import re

from checks import expect

MARK = '####'
KINDS = ('number', 'numbers', 'word')
# Digits of the longest number that is read. `int` refuses 4300, and a
# completion comes from a model.
_MOST_DIGITS = 200

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)'
_DECIMAL = rf'(?:{_DIGITS}(?:\.\d+)?|\.\d+)'
# 1 3/4, 3/4, 1,000.5 or 1.5e3; the sign stands before or after the $.
_NUMBER = re.compile(
  rf'(?P<sign>-?\$?-?)(?:(?P<whole>\d+) (?P<over>\d+)/(?P<under>\d+)'
  rf'|(?P<value>{_DECIMAL})(?:[eE](?P<power>[+-]?\d{{1,2}})(?!\d))?'
  rf'(?: ?/ ?(?P<divisor>{_DECIMAL}))?)'
)
_LATEX_FRACTION = re.compile(r'\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}')
_BOXED = re.compile(r'\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}')
_SAID = re.compile(r'\banswer(?: is|:)\s*:?([^\n]*)', re.IGNORECASE)
# U+2212 is a minus.
_ALIKE = str.maketrans({'\u2212': '-'})
# No-break and thin spaces only group digits.
_GROUPED = re.compile(r'(?<![\d.,])\d{1,3}(?:\s\d{3})+(?!\d)')
_THIN = re.compile(r'(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))')
_EMPHASIS = re.compile(r'\*\*|__|`|\\text\b|\\!|\\,|\{,\}')


@dataclasses.dataclass(frozen=True)
class Answer:
  """The right answer of a problem."""

  kind: str  # number | numbers (in this order) | word
  text: str  # in the spelling of a solution
  choices: tuple[str, ...] = ()  # for a word: the words that may be an answer

  def __post_init__(self):
    """Raises ValueError for a text that is no answer of this kind."""
    expect.one_of('answer kind', self.kind, KINDS)
    if self.kind == 'word':
      expect.one_of('answer', self.text, self.choices)
    elif not _readings(self, self.text):
      raise ValueError(f'answer: got {self.text!r}, expected {self.kind}')


def is_right(answer: Answer, completion: str, *, strict: bool = False) -> bool:
  """Returns whether a completion gives the right answer.

  Args:
    strict: whether only an answer after '####' counts.
  """
  given = _given(completion, strict)
  if given is None:
    return False
  text, is_marked = given
  if answer.kind == 'word':
    return _said_words(answer, text, is_marked) == [answer.text.casefold()]
  right = _readings(answer, answer.text)[0]
  if is_marked and answer.kind == 'number':
    # '5 - 3 = 2' answers 2, and the spaces of '1 000' group digits.
    text = _GROUPED.sub(_joined, text.rpartition('=')[2])
  found = _readings(answer, text)
  if answer.kind == 'numbers':
    return right in found
  # After a mark the first number counts, as in '18 apples for 3 days'; in
  # free text the last one, since the numbers before it led to the answer.
  return bool(found) and found[0][0 if is_marked else -1] == right[0]


def given(completion: str, *, is_strict: bool = False) -> str | None:
  """Returns the text in which a completion gives its answer; None for none.

  Args:
    is_strict: whether only an answer after '####' counts.
  """
  found = _given(completion, is_strict)
  return found[0] if found else None


def value(text: str) -> fractions.Fraction | None:
  """Returns the value of a text that is a number, None for any other text."""
  match = _NUMBER.fullmatch(_plain(text).lstrip(' $').rstrip(' .$%'))
  return _value(match) if match else None


def _given(completion: str, strict: bool) -> tuple[str, bool] | None:
  """Returns the text with the answer, and whether it has a mark."""
  _, mark, after = completion.partition(MARK)
  if mark:
    lines = after.strip().splitlines()
    return (lines[0], True) if lines else None
  if strict:
    return None
  for pattern in (_BOXED, _SAID):
    if (found := pattern.findall(completion)) and found[-1].strip():
      return found[-1], True
  return completion, False


def _plain(text: str) -> str:
  """Returns a text with one spelling of minus, spaces and fractions."""
  text = _LATEX_FRACTION.sub(r'\1/\2', text.translate(_ALIKE))
  return _THIN.sub('', _EMPHASIS.sub('', text))


def _joined(match: re.Match) -> str:
  return ''.join(match.group().split())


def _readings(answer: Answer, text: str) -> list[list[fractions.Fraction]]:
  """Returns the possible readings of a text as lists of numbers; none is empty.

  The commas of '1,000,200' group digits or separate numbers. A list is tried
  with both; a single number only has the first.
  """
  text = _plain(text)
  texts = [text]
  if answer.kind == 'numbers':
    texts.append(re.sub(r'[,;<>\[\]()]', ' , ', text))
  read = (list(_numbers(one)) for one in texts)
  return [numbers for numbers in read if numbers]


def _numbers(text: str) -> Iterator[fractions.Fraction]:
  for match in _NUMBER.finditer(text):
    found = _value(match, text[: match.start()])
    if found is not None:
      yield found


def _value(match: re.Match, before: str = '') -> fractions.Fraction | None:
  """Returns the value of a match of `_NUMBER`, None if it has none."""
  if sum(map(str.isdigit, match.group())) > _MOST_DIGITS:
    return None
  part = {
    name: text.replace(',', '') for name, text in match.groupdict('').items()
  }
  # A hyphen is a sign unless it joins two words: '5-3' ends in 3.
  is_joined = match.group().startswith('-') and re.search(r'[\w)]$', before)
  sign = -1 if '-' in part['sign'] and not is_joined else 1
  try:
    if part['whole']:
      parts = int(part['whole']), int(part['over']), int(part['under'])
      return sign * (parts[0] + fractions.Fraction(parts[1], parts[2]))
    number = fractions.Fraction(part['value'])
    number *= fractions.Fraction(10) ** int(part['power'] or 0)
    return sign * number / fractions.Fraction(part['divisor'] or 1)
  except ZeroDivisionError:
    return None


def _said_words(answer: Answer, text: str, is_marked: bool) -> list[str]:
  """Returns the choices that a text names, in its order, each once.

  Without a mark these are the choices of the last line that names any.
  """
  words = '|'.join(map(re.escape, sorted(answer.choices, key=len)))
  pattern = re.compile(rf'(?<!\w)(?:{words})(?!\w)', re.IGNORECASE)
  lines = [text] if is_marked else text.splitlines()
  for line in reversed(lines):
    if found := pattern.findall(_plain(line)):
      return list(dict.fromkeys(word.casefold() for word in found))
  return []
