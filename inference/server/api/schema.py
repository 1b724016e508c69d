"""The bodies of requests, and what all of them have.

A field is implemented, or refused unless it holds the value that changes
nothing. The settings that OpenAI does not have, with vLLM's names and meanings,
are made from the fields of `inference.sampling.settings.Settings`. Any other
field is refused. No field is ignored.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import typing
from typing import Annotated, Any, ClassVar, Self

import pydantic
import pydantic_core

from checks import expect
from inference.sampling import settings
from inference.server.api import errors

MAX_PROMPTS = 128  # of one request, as lm-eval's batches are
MAX_CHOICES = 128  # prompts times n
_MOST_ITEMS = 4096  # of a list that is no prompt of token ids; checks say less

# The field of a request body for each setting that the API has.
_API_NAMES = {
  field.name: name
  for field in dataclasses.fields(settings.Settings)
  if (name := field.metadata.get('api_name', field.name))
}
MAX_PRIORITY = 2**31 - 1
_UNKNOWN, _ABSENT = 'unknown_field', 'absent_kind'
_NUMERIC = 'minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'
# The keywords of JSON Schema that limit the values of a type.
_KEYWORDS = {
  'number': _NUMERIC,
  'integer': _NUMERIC,
  'string': ('minLength', 'maxLength'),
  'array': ('maxItems', 'items'),
  'object': ('maxProperties', 'additionalProperties', 'propertyNames'),
}


@dataclasses.dataclass(frozen=True)
class _FirstError:
  """Annotation: a list or dict is refused at its first wrong element.

  Otherwise pydantic makes an error for each of a million wrong elements.
  """

  most: int | None = None  # elements

  def __get_pydantic_core_schema__(self, source, handler):
    schema = {**handler(source), 'fail_fast': True}
    if self.most is not None:
      schema['max_length'] = self.most
    return schema


@dataclasses.dataclass(frozen=True)
class Unsupported:
  """Annotation: the field is refused, unless its value changes nothing."""

  why: str
  neutral: tuple[Any, ...] = ()  # values that are accepted, as null is

  def __get_pydantic_json_schema__(self, core_schema, handler):
    return {'enum': [None, *self.neutral], 'description': self.why}

  def accepts(self, value: Any) -> bool:
    """Returns whether a value changes nothing."""
    return value is None or any(
      type(value) is type(each) and value == each for each in self.neutral
    )


def known(*names: str, key: str | None = None) -> pydantic.BeforeValidator:
  """Returns an annotation: another name, as OpenAI has some, is refused.

  Args:
    *names: that this server supports.
    key: of the name, if the value is an object.
  """

  def check(value: Any) -> Any:
    got = None if key else value
    if key and isinstance(value, dict):
      got = value.get(key)
    if isinstance(got, str) and got not in names:
      raise pydantic_core.PydanticCustomError(
        _ABSENT, 'not supported', {'got': got, 'names': names}
      )
    return value

  return pydantic.BeforeValidator(check)


FEW = _FirstError(_MOST_ITEMS)
# The messages or items of a conversation: the size of a body bounds them.
TURNS = _FirstError()
Strings = Annotated[list[str], FEW]
Ids = Annotated[list[int], _FirstError()]
Prompts = str | Strings | Ids | Annotated[list[Ids], FEW]


def _described(schema: dict[str, Any], kind: type['Body']) -> None:
  """Adds to the schema of a body the texts and limits of its settings."""
  schema['additionalProperties'] = False
  properties = schema.get('properties', {})
  for field in dataclasses.fields(settings.Settings):
    found = properties.get(_API_NAMES.get(field.name, ''))
    if found is not None:
      found.setdefault('description', field.metadata['help'])
      _limit(found, field.metadata.get('limits', {}))
  for name, limits in kind.limits.items():
    _limit(properties[name], limits)


def _limit(found: dict[str, Any], limits: dict[str, Any]) -> None:
  for each in (found, *found.get('anyOf', ())):
    of_kind = _KEYWORDS.get(each.get('type', ''), ())
    each.update({name: limits[name] for name in limits if name in of_kind})


class Body(pydantic.BaseModel):
  """A body, or an object in it. No field is ignored."""

  most_lists: ClassVar[int] = MAX_PROMPTS + 64  # and objects, in all
  # Of fields: keywords of JSON Schema, for limits that no type says.
  limits: ClassVar[dict[str, dict[str, Any]]] = {}

  # Strict: '0.5' is no number, and true is not 1. Unknown fields are allowed
  # here and refused below: pydantic would make an error of each.
  model_config = pydantic.ConfigDict(
    extra='allow',
    strict=True,
    json_schema_extra=_described,
  )

  @pydantic.model_validator(mode='after')
  def _refuse_unknown(self) -> Self:
    for name in self.model_extra or ():
      raise pydantic_core.PydanticCustomError(
        _UNKNOWN, 'unknown field', {'name': name}
      )
    return self

  @classmethod
  def unsupported(cls) -> dict[str, Unsupported]:
    """Returns the fields that are refused."""
    return {
      name: note
      for name, field in cls.model_fields.items()
      for note in field.metadata
      if isinstance(note, Unsupported)
    }

  def refuse_unsupported(self) -> None:
    """Refuses fields that this server knows, but does not support.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    for name, note, value in self._unsupported_values():
      if not note.accepts(value):
        expected = ' or '.join(map(repr, (None, *note.neutral)))
        raise errors.ApiError(
          400,
          f'{name}: got {expect.shown(value)}, expected {expected}; this server'
          f' does not support it, leave it out: {note.why}',
          param=name,
          code='unsupported_parameter',
        )

  def _unsupported_values(
    self, where: str = ''
  ) -> Iterator[tuple[str, Unsupported, Any]]:
    """Yields names, notes and values, also of the objects in this one."""
    for name, note in self.unsupported().items():
      yield where + name, note, getattr(self, name)
    for name in type(self).model_fields:
      value = getattr(self, name)
      for each in value if isinstance(value, list) else [value]:
        if isinstance(each, Body):
          yield from each._unsupported_values(f'{where}{name}.')


_Body = typing.TypeVar('_Body', bound=Body)


class StreamOptions(Body):
  """Options of a stream."""

  include_usage: bool = pydantic.Field(
    default=False, description='Sends the usage in one more chunk, the last.'
  )


def with_settings(
  base: type[_Body], fields: Sequence[dataclasses.Field]
) -> type[_Body]:
  """Returns `base` with a field for each setting that it lacks.

  A tuple becomes a list, as JSON has it. None means that the request does not
  choose the setting.
  """
  added: dict[str, Any] = {}
  for field in fields:
    name = field.metadata.get('api_name', field.name)
    if not name or name in base.model_fields:
      continue
    kind: Any = field.type
    if typing.get_origin(kind) is tuple:
      kind = Annotated[list[typing.get_args(kind)[0]], FEW]
    default = pydantic.Field(default=None, description=field.metadata['help'])
    added[name] = (kind | None, default)
  return pydantic.create_model('_VllmRequest', __base__=base, **added)


def check_common(body: Any, *, is_shared: bool) -> None:
  """Checks the fields that the bodies of several routes have.

  Args:
    body: with the fields stream, n and priority.
    is_shared: whether the server has API keys.

  Raises:
    ApiError: status 400; `param` names the field.
  """
  body.refuse_unsupported()
  if body.stream_options is not None and not body.stream:
    raise errors.invalid(
      'stream_options', 'got options without stream, expected stream: true'
    )
  if body.n is not None and body.n < 1:
    raise errors.invalid('n', f'got {body.n}, expected at least 1')
  least = 0 if is_shared else -MAX_PRIORITY
  if not least <= (body.priority or 0) <= MAX_PRIORITY:
    raise errors.invalid(
      'priority',
      f'got {body.priority}, expected {least} to {MAX_PRIORITY}; 0 is the'
      ' default, and a higher number is served later',
    )


def chosen_settings(body: Any) -> dict[str, Any]:
  """Returns the settings of a body made by `with_settings`; None: not chosen.

  Raises:
    SettingError: a key of logit_bias is no token id.
  """
  chosen = {
    setting: _frozen(getattr(body, name))
    for setting, name in _API_NAMES.items()
  }
  if body.top_k == -1:
    chosen['top_k'] = 0  # vLLM's clients send -1 for all tokens
  if isinstance(body.stop, str):
    chosen['stop'] = (body.stop,)
  if body.logit_bias is not None:
    chosen['logit_bias'] = settings.bias_pairs(body.logit_bias)
  return chosen


def parsed(kind: type[_Body], raw: bytes, *, context: int) -> _Body:
  """Returns a body of JSON.

  Args:
    kind: of the body.
    raw: the bytes.
    context: most tokens of a prompt, which bounds the values of a body.

  Raises:
    ApiError: status 400, about the first field that is wrong.
  """
  _check_counts(
    raw,
    most_values=MAX_PROMPTS * context + 3 * _MOST_ITEMS,
    most_lists=kind.most_lists,
  )
  try:
    return kind.model_validate_json(raw)
  except pydantic.ValidationError as error:
    raise from_validation(
      error.errors(include_url=False, include_input=False)
    ) from None


def _check_counts(raw: bytes, *, most_values: int, most_lists: int) -> None:
  """Refuses a body with more parts than any request has, before it is parsed.

  A parser holds Python's lock from the first byte to the last: a MiB of `[],`
  takes it 380 ms, and no other request is served. These searches take 4 ms.
  """
  bare = raw.replace(b'\\\\', b'').replace(b'\\"', b'')  # no escaped quotes
  num_strings = bare.count(b'"') // 2
  _check_count('strings', num_strings, 3 * _MOST_ITEMS)
  between = b''.join(bare.split(b'"')[::2])
  num_lists = between.count(b'[') + between.count(b'{')
  _check_count('lists and objects', num_lists, most_lists)
  _check_count('values', between.count(b','), most_values)


def _check_count(what: str, num: int, most: int) -> None:
  if num > most:
    raise errors.ApiError(
      400,
      f'body: got {num} {what}, expected at most {most}, as no request needs'
      ' more; send several requests',
      param=None,
      code=None,
    )


def from_setting(error: settings.SettingError) -> errors.ApiError:
  """Returns a 400 about a setting, under its name in the API."""
  name = _API_NAMES.get(error.setting, error.setting)
  return errors.invalid(name, str(error).removeprefix(f'{error.setting}: '))


def from_validation(found: Sequence[Any]) -> errors.ApiError:
  """Returns a 400 about the first field that pydantic refused."""
  # Of a union, the alternative that the value was meant for.
  error = next((each for each in found if each['type'] == _ABSENT), found[0])
  if error['type'] == 'json_invalid':
    message = f'body: got invalid JSON ({error["ctx"]["error"]})'
    return errors.ApiError(400, message, param=None, code=None)
  # loc is (field, alternative of a union, index); the field is shown.
  where = [
    part[: expect.MOST_SHOWN]
    for part in map(str, error['loc'])
    if '[' not in part  # the name of an alternative, as pydantic writes it
  ]
  if error['type'] == _UNKNOWN:
    where.append(error['ctx']['name'][: expect.MOST_SHOWN])
  if error['type'] == _ABSENT:
    names = ', '.join(map(repr, error['ctx']['names']))
    message = (
      f'{".".join(where)}: got {expect.shown(error["ctx"]["got"])}, expected'
      f' {names}; this server does not support it, leave it out'
    )
    return errors.ApiError(
      400, message, param=where[0], code='unsupported_parameter'
    )
  if not where:
    message = 'body: got no JSON object, expected one'
    return errors.ApiError(400, message, param=None, code=None)
  if error['type'] == _UNKNOWN:
    message = (
      f'{".".join(where)}: got a parameter that this server does not know,'
      ' expected one that /v1/capabilities lists; leave it out'
    )
    return errors.ApiError(
      400, message, param=where[0], code='unsupported_parameter'
    )
  # A union reports an error per alternative; they are joined into one message.
  wanted = dict.fromkeys(
    other['msg'] for other in found if other['loc'][:1] == error['loc'][:1]
  )
  # Of a list, the item is named too: a conversation may have many.
  is_listed = len(error['loc']) > 2 and isinstance(error['loc'][1], int)
  place = '.'.join(where) if is_listed else where[0]
  message = f'{place}: {"; or: ".join(wanted)}'
  return errors.ApiError(400, message, param=where[0], code=None)


def as_prompts(prompts: Prompts) -> list[str | list[int]]:
  """Returns one prompt, or several, as a list."""
  if isinstance(prompts, str):
    return [prompts]
  if prompts and isinstance(prompts[0], int):
    return [prompts]  # pyright: ignore[reportReturnType]
  return list(prompts)  # pyright: ignore[reportReturnType]


def _frozen(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value
