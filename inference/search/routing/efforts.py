"""Efforts that a router chooses among: what each of them does.

    parsed('self_consistency:16')
    parsed('reasoning:512')
    parsed('best_of_n:4:column_sum')
    parsed('best_of_n:4+reasoning:128')

An effort is a strategy, most tokens of reasoning, or both. The name in the
table of outcomes says all of it, so that a server does what was measured.
"""

import dataclasses

from checks import expect
from inference.search import options as options_lib

AUTO = 'auto'  # the effort that a router chooses
_REASONING = 'reasoning'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
  """A way to answer."""

  spec: options_lib.Spec
  most_reasoning: int | None = None  # tokens; None: no limit


def parsed(name: str) -> Effort:
  """Returns the effort of a name.

  Raises:
    ValueError: the name is none of an effort.
  """
  spec, most, seen = options_lib.Spec(name='once'), None, set()
  for part in name.split('+'):
    kind, _, number = part.partition(':')
    is_reasoning = kind == _REASONING
    if is_reasoning in seen:
      raise _refused(name)
    seen.add(is_reasoning)
    if not is_reasoning:
      try:
        spec = options_lib.parsed(part)
      except ValueError as error:
        raise _refused(name) from error
    elif number.isascii() and number.isdigit():
      most = int(number)
    else:
      raise _refused(name)
  if spec.name == 'wait' and not most:
    raise _refused(name)  # it needs an end of its reasoning
  return Effort(spec=spec, most_reasoning=most)


def _refused(name: str) -> ValueError:
  return ValueError(
    f'effort: got {expect.shown(name)}, expected a strategy such as once,'
    ' self_consistency:4 or best_of_n:4:SCORER, reasoning:TOKENS, or both with'
    ' + between; name the efforts of the outcomes so, and fit the predictor'
    ' again'
  )
