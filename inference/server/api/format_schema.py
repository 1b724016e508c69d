"""Formats of answers: fields of bodies that hold an answer to a grammar.

`response_format` and `text.format` are OpenAI's, `structured_outputs` is
vLLM's. Each gives a constraint; see `inference.constraints`.
"""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from checks import expect
from inference.constraints import calls, constraint as constraint_lib, schemas
from inference.sampling import settings as settings_lib
from inference.server.api import errors, schema

_KINDS = 'text', 'json_object', 'json_schema'
# vLLM has removed these in 0.12, for structured_outputs.
_Old = schema.Unsupported('send structured_outputs')
_Schema = dict[str, Any]
JSON_FORMATS = (
  'text: any text; json_object: a JSON object; json_schema: JSON of the schema,'
  ' with strict or without. A keyword that cannot be kept is refused with its'
  ' path.'
)


class Language(NamedTuple):
  """The texts that an answer may be, and the field that says so."""

  param: str
  constraint: constraint_lib.Constraint


class PlainText(schema.Body):
  """Any text."""

  type: Literal['text']


class JsonObject(schema.Body):
  """A JSON object."""

  type: Literal['json_object']


class NamedSchema(schema.Body):
  """A JSON schema with a name."""

  name: str
  description: str | None = None
  schema_: _Schema = pydantic.Field(alias='schema')
  # Answers are of the schema in either case.
  strict: bool | None = None


class JsonSchema(schema.Body):
  """JSON of a schema, as a chat asks for it."""

  type: Literal['json_schema']
  json_schema: NamedSchema


class FlatJsonSchema(NamedSchema):
  """JSON of a schema, as /v1/responses asks for it."""

  type: Literal['json_schema']


ResponseFormat = Annotated[
  PlainText | JsonObject | JsonSchema,
  pydantic.Discriminator('type'),
  schema.known(*_KINDS, key='type'),
]
TextFormat = Annotated[
  PlainText | JsonObject | FlatJsonSchema,
  pydantic.Discriminator('type'),
  schema.known(*_KINDS, key='type'),
]


class StructuredOutputs(schema.Body):
  """One language of vLLM's: json, regex, choice, grammar or json_object."""

  json_: _Schema | bool | str | None = pydantic.Field(
    default=None,
    alias='json',
    description='A JSON schema, or its JSON text.',
  )
  regex: str | None = pydantic.Field(
    default=None, description='Matches the whole text.'
  )
  choice: schema.Strings | None = pydantic.Field(
    default=None, description='The text is one of these.'
  )
  grammar: str | None = pydantic.Field(
    default=None,
    description="A context-free grammar, in llguidance's dialect of Lark.",
  )
  json_object: bool | None = pydantic.Field(
    default=None, description='True: any JSON object.'
  )
  structural_tag: Annotated[
    Any, schema.Unsupported('send tools with strict')
  ] = None
  disable_any_whitespace: Annotated[
    Any, schema.Unsupported('JSON may have white space', (False,))
  ] = None
  disable_additional_properties: Annotated[
    Any, schema.Unsupported('say so in the schema', (False,))
  ] = None
  whitespace_pattern: Annotated[
    Any, schema.Unsupported('JSON has one space, or lines, between its parts')
  ] = None

  def constraint(self) -> constraint_lib.Constraint:
    """Returns the language.

    Raises:
      ConstraintError: it is not one, or no language.
    """
    makers = {
      'json': (self.json_, constraint_lib.json_schema),
      'regex': (self.regex, constraint_lib.regex),
      'choice': (self.choice, constraint_lib.choice),
      'grammar': (self.grammar, constraint_lib.lark),
      'json_object': (
        self.json_object or None,
        lambda _: constraint_lib.json_object(),
      ),
    }
    given = [name for name, (value, _) in makers.items() if value is not None]
    if len(given) != 1:
      raise constraint_lib.ConstraintError(
        f'got {" and ".join(given) or "no language"}, expected one of'
        f' {", ".join(makers)}'
      )
    value, make = makers[given[0]]
    try:
      return make(value)
    except constraint_lib.ConstraintError as error:
      raise constraint_lib.ConstraintError(f'{given[0]}: {error}') from None


class Languages(schema.Body):
  """The fields of a body that say which texts an answer may be."""

  response_format: ResponseFormat | None = pydantic.Field(
    default=None, description=JSON_FORMATS
  )
  structured_outputs: StructuredOutputs | None = pydantic.Field(
    default=None, description="The language of the text, in vLLM's words."
  )
  guided_json: Annotated[Any, _Old] = None
  guided_regex: Annotated[Any, _Old] = None
  guided_choice: Annotated[Any, _Old] = None
  guided_grammar: Annotated[Any, _Old] = None
  guided_decoding_backend: Annotated[Any, _Old] = None
  guided_whitespace_pattern: Annotated[Any, _Old] = None

  @property
  def is_constrained(self) -> bool:
    """Whether a grammar is compiled for the answer."""
    found = self.response_format
    return bool(self.structured_outputs) or (
      found is not None and found.type != 'text'
    )

  def language(self) -> Language | None:
    """Returns the language of the answer; None: any text.

    Raises:
      ApiError: status 400, it is not one language.
    """
    found = of_format(self.response_format, 'response_format')
    if self.structured_outputs is None:
      return found
    param = 'structured_outputs'
    if found:
      raise errors.invalid(
        param, 'got both it and response_format, expected one of them'
      )
    with refusals(param):
      return Language(param, self.structured_outputs.constraint())


def of_format(found: Any, param: str) -> Language | None:
  """Returns the language of a format; None: any text.

  Args:
    found: a `ResponseFormat` or `TextFormat`; None: any text.
    param: the field that has it.

  Raises:
    ApiError: status 400, the schema is too long.
  """
  with refusals(param):
    match found:
      case JsonObject():
        return Language(param, constraint_lib.json_object())
      case JsonSchema():
        schema_ = found.json_schema.schema_
        return Language(param, constraint_lib.json_schema(schema_))
      case FlatJsonSchema():
        return Language(param, constraint_lib.json_schema(found.schema_))
  return None


class ToolUse(NamedTuple):
  """The tools of a request, and whether an answer must call one."""

  tools: tuple[calls.Tool, ...]  # that an answer may call
  is_held: bool  # to a grammar: a call is forced, or one is strict
  is_forced: bool
  is_single: bool


def tool_use(
  functions: Sequence[Any],
  *,
  choice: str,
  only: str | None,
  is_single: bool,
  place: str,
) -> ToolUse:
  """Returns the use of the tools of a request.

  Args:
    functions: each with name, parameters and strict.
    choice: none, auto or required.
    only: the name of the one that must be called; None: any.
    is_single: whether an answer has one call at most.
    place: of the parameters in a tool, for errors.

  Raises:
    ApiError: status 400, a call is forced, and there is no such tool; or a
      schema cannot be kept.
  """
  is_forced = choice == 'required'
  names = [each.name for each in functions]
  if is_forced and (not names or (only is not None and only not in names)):
    raise errors.invalid(
      'tool_choice',
      f'got {expect.shown(only or choice)} with'
      f' {"the tools " + ", ".join(names) if names else "no tools"}, expected'
      ' a tool of the request',
    )
  is_held = is_forced or any(each.strict for each in functions)
  if choice == 'none' or not is_held:
    return ToolUse((), False, False, is_single)
  found = []
  for index, each in enumerate(functions):
    if only is not None and each.name != only:
      continue
    is_strict = each.strict or (is_forced and each.strict is None)
    parameters = each.parameters if is_strict else None
    _check_parameters(parameters, f'tools[{index}].{place}')
    found.append(calls.Tool(name=each.name, parameters=parameters))
  return ToolUse(tuple(found), True, is_forced, is_single or only is not None)


def _check_parameters(parameters: Any, where: str) -> None:
  """Refuses a schema that arguments cannot be held to, with its path."""
  if parameters is None:
    return
  if parameters.get('type', 'object') != 'object':
    raise errors.invalid(
      'tools',
      f'{where}: got the type {expect.shown(parameters["type"])}, expected'
      " 'object'",
    )
  try:
    schemas.check(parameters)
  except constraint_lib.ConstraintError as error:
    raise errors.invalid('tools', f'{where}: {error}') from error


@contextlib.contextmanager
def refusals(param: str) -> Iterator[None]:
  """Turns the error of a constraint into a 400 about its field."""
  try:
    yield
  except constraint_lib.ConstraintError as error:
    raise errors.invalid(param, str(error)) from error
  except ModuleNotFoundError as error:
    raise _unavailable(param, str(error)) from error
  except settings_lib.SettingError as error:
    if error.setting != 'constraint':
      raise
    raise _unavailable(param, str(error)) from error


def _unavailable(param: str, why: str) -> errors.ApiError:
  return errors.ApiError(
    400,
    f'{param}: {why.removeprefix("constraint: ")}',
    param=param,
    code='unsupported_parameter',
  )
