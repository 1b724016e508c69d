"""The part of an answer that is code or JSON."""

from collections.abc import Sequence
import re

_BLOCK = re.compile(r'^```[ \t]*(\w*)[^\n]*\n(.*?)^```', re.M | re.S)


def block(answer: str, languages: Sequence[str]) -> str:
  """Returns the last fenced block of an answer, without its fences.

  Blocks that name one of the languages come before blocks that name none. An
  answer without such a block is all code.
  """
  found = _BLOCK.findall(answer)
  for names in (languages, ('',)):
    texts = [text for name, text in found if name.lower() in names]
    if texts:
      return texts[-1]
  return answer
