"""The number that a completion gives, read as in GSM8K and its followers.

`text.replies.answers` has the value of a number in any spelling, and a
more lenient reading of completions, which the verifiers use.
"""

import fractions
import re

from text.replies import answers

# With or without a sign, thousands separators and a decimal part.
PATTERN = r'-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+'
_ANY = re.compile(PATTERN)


def last_number(text: str) -> fractions.Fraction | None:
  """Returns the last number of a text, None if there is none.

  A hyphen is a sign unless it joins two words: '5-3' ends in 3, 'is -3' in -3.
  """
  matches = list(_ANY.finditer(text))
  if not matches:
    return None
  found, start = matches[-1].group(), matches[-1].start()
  if found[0] == '-' and start and re.match(r'[\w)]', text[start - 1]):
    found = found[1:]
  return number(found)


def number(text: str) -> fractions.Fraction | None:
  """Returns the value of a text that is a number, None for any other text.

  '$1,200.50', ' 18. ', '18.0' and '18%' are numbers. Numbers of the same value
  compare equal in any spelling.
  """
  return answers.value(text)
