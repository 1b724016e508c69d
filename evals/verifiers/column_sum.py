"""The verifier of a sum in columns: a program that checks each step.

    9+3+0=12
    4+7+1=12
    #### 122

It does not know the question or the right answer, so that it may choose among
answers to questions that nobody has answered. A digit that was copied wrongly
from the question is no wrong step.
"""

import dataclasses
import re

from evals.verifiers import verifier
from text.replies import answers

_STEP = re.compile(r'(\d)\+(\d)\+(\d)=(\d+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnSum(verifier.Verifier):
  """Lines of a sum in columns that follow from each other.

  A line a+b+c=d must be a right sum, its carry c that of the line before, and
  the last line the number that the columns spell. An answer that ends with a
  column lacks this line: so the beginning of an answer, in a search over steps,
  is scored by its columns.
  """

  NEEDS_RECORD = False

  def check(self, record: verifier.Record) -> None:
    """Accepts every record; none of its fields is read."""

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns the share of the lines that are right."""
    lines = answer.strip().splitlines()
    last = ''
    if lines and not _STEP.fullmatch(lines[-1].strip()):
      last = lines.pop()
    num_right, carry, total = 0, 0, 0
    for place, line in enumerate(lines):
      match = _STEP.fullmatch(line.strip())
      if match is None:
        continue
      first, second, third, result = map(int, match.groups())
      num_right += first + second + third == result and third == carry
      carry = result // 10
      total += result % 10 * 10**place
    total += carry * 10 ** len(lines)
    num_right += last.strip() == f'{answers.MARK} {total}'
    num = len(lines) + 1
    return verifier.Score(num_right / num, f'{num_right} of {num} lines follow')
