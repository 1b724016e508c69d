"""The grammar of a constraint, in the words of llguidance.

    start: think? SPACE body      if the model may reason first
    body: ...                     the schema, regex, choice, grammar or calls

Reasoning is free text between its markers. A marker that is a special token is
named by its id, so that the same string in ordinary tokens is text.
"""

from collections.abc import Mapping
import json
from typing import Any

from inference.constraints import calls, constraint as constraint_lib, schemas

# White space between two tokens of JSON is one space, or a line break with an
# indentation. Without this bound, a model could write white space without end.
_SPACE = r'( |\n[ ]{0,24})?'
_INNER = 'inner'  # the name of a grammar within the grammar


def source(
  library: Any,
  constraint: constraint_lib.Constraint,
  special_tokens: Mapping[str, int],
) -> str:
  """Returns the grammar of a constraint.

  Args:
    library: llguidance.
    constraint: the constraint to express.
    special_tokens: ids of the special tokens.

  Raises:
    ConstraintError: no grammar can enforce the constraint completely.
  """

  def marker(text: str) -> str:
    found = special_tokens.get(text)
    return json.dumps(text) if found is None else f'<[{found}]>'

  lark = f'{_beginning(constraint.thought, special_tokens)}\n'
  grammars = []
  if constraint.kind == constraint_lib.CALLS:
    asked = json.loads(constraint.text)
    lark += calls.rules(asked, marker, json_rule)
    answer = asked['answer']
    if answer is not None:
      inner = constraint_lib.Constraint(**answer)
      lark += '\n' + _body('answer', library, inner, grammars)
  else:
    lark += _body('body', library, constraint, grammars)
  return json.dumps(
    {'grammars': [{'name': 'main', 'lark_grammar': lark}, *grammars]}
  )


def json_rule(schema: Any) -> str:
  """Returns the Lark symbol of JSON that matches a schema.

  Raises:
    ConstraintError: a keyword cannot be enforced.
  """
  schemas.check(schema)
  if isinstance(schema, bool):
    schema = {} if schema else {'enum': []}
  schema = {**schema, 'x-guidance': {'whitespace_pattern': _SPACE}}
  return f'%json {json.dumps(schema)}'


def _body(
  name: str,
  library: Any,
  constraint: constraint_lib.Constraint,
  grammars: list[dict[str, Any]],
) -> str:
  """Returns the rule of a language; adds a grammar that it names."""
  text = constraint.text
  if constraint.kind == constraint_lib.JSON_SCHEMA:
    return f'{name}: {json_rule(json.loads(text))}'
  if constraint.kind == constraint_lib.CHOICE:
    return f'{name}: {" | ".join(map(json.dumps, json.loads(text)))}'
  if constraint.kind == constraint_lib.REGEX:
    return f'{name}: BODY\nBODY: /{library.regex_to_lark(text)}/'
  text = schemas.checked_lark(text)
  grammars.append({'name': _INNER, 'lark_grammar': text})
  return f'{name}: @{_INNER}'


def _beginning(
  thought: constraint_lib.Thought | None, special_tokens: Mapping[str, int]
) -> str:
  """Returns the first rules: reasoning, if there may be some, then a body."""
  if thought is None:
    return 'start: body'
  opening, closing = (
    special_tokens.get(each) for each in (thought.opening, thought.closing)
  )
  begin = json.dumps(thought.opening) if opening is None else f'<[{opening}]>'
  if closing is None:
    rest = f'thought\nthought[suffix={json.dumps(thought.closing)}]: TEXT'
    rest = rest.replace('TEXT', '/(?s:.*)/')
  else:
    rest = f'THOUGHT <[{closing}]>\nTHOUGHT: /(?s:.*)/'
  first = 'think' if thought.is_open else 'think?'
  begin = '' if thought.is_open else begin
  return f'start: {first} SPACE body\nthink: {begin} {rest}\n' + (
    r'SPACE: /[ \n]{0,4}/'
  )
