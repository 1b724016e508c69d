"""Fields of a request that say how much to spend on its answer.

"reasoning_effort": "low"
"reasoning": {"budget": 500}
    "strategy": {"name": "best_of_n", "n": 16}, "budget": {"tokens": 4000}
"""

from typing import Any, Literal

import pydantic

from inference.search import budget as budget_lib, options as options_lib
from inference.server.api import errors, schema

Effort = Literal['none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'auto']
EFFORT = (
  'Most reasoning, by a name of --server.reasoning_efforts: none closes the'
  ' reasoning at once. The closing marker is put in where the limit is reached.'
  ' auto chooses by a prediction of the right answer, where the server has'
  ' --server.effort_predictor; the receipt names the effort.'
)
AUTO = 'auto'
STRATEGY = (
  'How to spend more on the answer, which is then one of several samples. The'
  ' receipt is in usage.'
)
BUDGET = 'Most that the answer may cost, whatever it is.'
_ABOVE_0: dict[str, Any] = {'exclusiveMinimum': 0}


class Reasoning(schema.Body):
  """Limits of the reasoning; only one of them."""

  effort: Effort | None = pydantic.Field(default=None, description=EFFORT)
  budget: int | None = pydantic.Field(
    default=None,
    description='Most tokens of reasoning.',
    json_schema_extra={'minimum': 0},
  )

  @property
  def is_limited(self) -> bool:
    """Whether a limit is given."""
    return self.effort is not None or self.budget is not None


class Strategy(schema.Body):
  """A way to spend a budget."""

  name: Literal[
    'once',
    'best_of_n',
    'self_consistency',
    'beam',
    'dvts',
    'revision',
    'wait',
  ]
  n: int | None = pydantic.Field(
    default=None,
    description='Samples, votes, answers or ends of reasoning; not with once.',
    json_schema_extra={'minimum': 1, 'maximum': options_lib.MOST},
  )
  scorer: str | None = pydantic.Field(
    default=None,
    description='What says how good a sample is: likelihood, self (the model is'
    ' asked whether its answer is right), a name of --server.scorers, or a'
    ' verifier of --server.verifiers, with the record that it reads. It weighs'
    ' the votes of self_consistency. null: likelihood; equal votes.',
  )
  record: dict[str, Any] | None = pydantic.Field(
    default=None,
    description='Fields that a verifier reads, such as {"answer": "42"}.',
  )


class Budget(schema.Body):
  """The most that an answer may cost; each unit is optional."""

  tokens: int | None = pydantic.Field(
    default=None,
    description='Sampled tokens, kept or not.',
    json_schema_extra={'minimum': 1},
  )
  flops: float | None = pydantic.Field(default=None, json_schema_extra=_ABOVE_0)
  money: float | None = pydantic.Field(
    default=None,
    description='In the currency of /v1/prices.',
    json_schema_extra=_ABOVE_0,
  )
  seconds: float | None = pydantic.Field(
    default=None, json_schema_extra=_ABOVE_0
  )

  def value(self) -> budget_lib.Budget:
    """Returns the budget.

    Raises:
      ApiError: status 400, a limit is not finite.
    """
    try:
      return budget_lib.Budget(**self.model_dump(exclude_none=True))
    except ValueError as error:
      message = str(error).removeprefix('budget: ')
      raise errors.invalid('budget', message) from error


def check(body: Any) -> None:
  """Refuses fields that contradict each other.

  Raises:
    ApiError: status 400; `param` names the field.
  """
  check_reasoning(body.reasoning, getattr(body, 'reasoning_effort', None))
  if body.budget:
    body.budget.value()
  if not body.is_search:
    return
  if effort_of(body)[1] == AUTO and body.strategy:
    raise errors.invalid(
      'strategy',
      f'got {body.strategy.name} with the effort auto, expected one of them:'
      ' auto chooses the strategy',
    )
  for name, is_given in (
    ('n', (getattr(body, 'n', None) or 1) > 1),
    ('logprobs', getattr(body, 'logprobs', None)),
    ('include', getattr(body, 'has_logprobs', False)),
    ('tools', body.tools),
  ):
    if is_given:
      raise errors.invalid(
        name,
        'got it with a strategy, a budget or the effort auto, expected none:'
        ' the answer is one text, chosen among samples; leave one of them out',
      )
  spec(body)


def is_search(body: Any) -> bool:
  """Returns whether a strategy answers a body."""
  is_auto = effort_of(body)[1] == AUTO
  return body.strategy is not None or body.budget is not None or is_auto


def effort_of(body: Any) -> tuple[str, Effort | None]:
  """Returns the field of the effort of a body, and the effort."""
  if effort := getattr(body, 'reasoning_effort', None):
    return 'reasoning_effort', effort
  return 'reasoning.effort', body.reasoning and body.reasoning.effort


def num_sampled(receipt: dict[str, Any]) -> int:
  """Returns all sampled tokens of a receipt, discarded ones too."""
  return sum(
    receipt[f'{name}_tokens'] for name in ('reasoning', 'answer', 'discarded')
  )


def check_reasoning(
  limits: Reasoning | None, effort: Effort | None = None
) -> None:
  """Refuses limits of reasoning that contradict each other.

  Args:
    limits: the field `reasoning` of a body.
    effort: the field `reasoning_effort` of a body.

  Raises:
    ApiError: status 400; `param` names the field.
  """
  given = [
    name
    for name, value in (
      ('reasoning_effort', effort),
      ('reasoning.effort', limits and limits.effort),
      ('reasoning.budget', None if limits is None else limits.budget),
    )
    if value is not None
  ]
  if len(given) > 1:
    raise errors.invalid(
      given[-1], f'got it and {given[0]}, expected one of them'
    )
  most = limits.budget if limits else None
  if most is not None and not 0 <= most < 2**31:
    raise errors.invalid(
      'reasoning.budget', f'got {most}, expected 0 to {2**31 - 1} tokens'
    )


def spec(body: Any) -> options_lib.Spec:
  """Returns the strategy of a body; one sample if it has none.

  Raises:
    ApiError: status 400, the number of the strategy is wrong.
  """
  asked = body.strategy
  if asked is None:
    return options_lib.Spec(name='once')
  meaning = options_lib.NAMES[asked.name]
  if (asked.n is None) != (meaning is None):
    expected = f'n ({meaning})' if meaning else 'none'
    raise errors.invalid(
      'strategy.n', f'got {asked.n} with {asked.name}, expected {expected}'
    )
  try:
    return options_lib.Spec(name=asked.name, n=asked.n or 1)
  except ValueError as error:
    message = str(error).removeprefix('strategy: ')
    raise errors.invalid('strategy.n', message) from error


def most_reasoning(
  efforts: dict[str, int | None],
  limits: Reasoning | None,
  effort: Effort | None = None,
) -> tuple[str, int | None]:
  """Returns the field that limits reasoning, and the most tokens of it.

  Args:
    efforts: tokens of each effort, None for no limit.
    limits: the field `reasoning` of a body.
    effort: the field `reasoning_effort` of a body.
  """
  if effort is not None:
    return 'reasoning_effort', efforts[effort]
  if limits is not None and limits.effort is not None:
    return 'reasoning.effort', efforts[limits.effort]
  return 'reasoning.budget', limits.budget if limits else None
