"""The constraint of a request: the language that its completion belongs to.

    constraint = json_schema({'type': 'object', ...})
    settings = settings_lib.Settings(constraint=constraint)

Imports nothing heavy: `inference.sampling.settings` has it as a field.
`inference.constraints.grammars` compiles it.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import json
from typing import Any

from checks import expect

JSON_SCHEMA, REGEX, CHOICE, LARK = KINDS = (
  'json_schema',
  'regex',
  'choice',
  'lark',
)
CALLS = 'calls'  # tool calls, see `inference.constraints.calls`
# Characters of all texts of a constraint. This limit and the limits of
# `grammars` bound the time and memory of compiling.
MOST_CHARACTERS = 100_000
MOST_CHOICES = 1000


class ConstraintError(ValueError):
  """A constraint that cannot be kept; the message says where and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thought:
  """Reasoning that may come before the answer; no grammar constrains it."""

  opening: str  # markers around it
  closing: str
  is_open: bool  # the prompt ends inside of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
  """A language; `text` is a schema, a regex, a JSON list, or a grammar.

  Raises:
    ConstraintError: the kind is unknown, or the text is empty or too long.
  """

  kind: str
  text: str
  thought: Thought | None = None

  def __post_init__(self):
    if self.kind not in (*KINDS, CALLS):
      raise ConstraintError(
        f'kind: got {self.kind!r}, expected one of {", ".join(KINDS)}'
      )
    if not 0 < len(self.text) <= MOST_CHARACTERS:
      raise ConstraintError(
        f'{self.kind}: got {len(self.text):,} characters, expected 1 to'
        f' {MOST_CHARACTERS:,}; shorten it'
      )


def json_schema(schema: Any) -> Constraint:
  """Returns the constraint to JSON that matches a schema.

  Args:
    schema: the schema, as an object or as its JSON text.

  Raises:
    ConstraintError: the text is no JSON, or too long.
  """
  if isinstance(schema, str):
    try:
      schema = json.loads(schema)
    except (ValueError, RecursionError):
      raise ConstraintError(
        f'json_schema: got {expect.shown(schema)}, expected JSON'
      ) from None
  # The order of properties is the order in which they are written.
  return Constraint(kind=JSON_SCHEMA, text=json.dumps(schema))


def json_object() -> Constraint:
  """Returns the constraint to any JSON object."""
  return json_schema({'type': 'object'})


def regex(pattern: str) -> Constraint:
  """Returns the constraint to texts that a regular expression matches whole."""
  return Constraint(kind=REGEX, text=pattern)


def choice(texts: Sequence[str]) -> Constraint:
  """Returns the constraint to one of some texts.

  Raises:
    ConstraintError: there is no text, there are too many, or one is empty.
  """
  if not 1 <= len(texts) <= MOST_CHOICES or not all(texts):
    raise ConstraintError(
      f'choice: got {len(texts)} texts, expected 1 to {MOST_CHOICES}, none of'
      ' them empty'
    )
  return Constraint(kind=CHOICE, text=json.dumps(list(texts)))


def lark(grammar: str) -> Constraint:
  """Returns the constraint to a context-free grammar in llguidance's Lark."""
  return Constraint(kind=LARK, text=grammar)


def is_available() -> bool:
  """Returns whether the library that compiles grammars is installed."""
  return importlib.util.find_spec('llguidance') is not None
