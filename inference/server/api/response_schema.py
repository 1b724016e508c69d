"""The body of POST /v1/responses: items in, and what may be done with them.

An item is a message, a call of a function, its output, or reasoning. Items that
a response had in its output may be sent back as they are. Kinds of items and
tools that this server does not have are refused by their names.
"""

from typing import Annotated, Any, ClassVar, Literal

import pydantic

from inference.server.api import (
  chat_schema,
  errors,
  format_schema,
  schema,
  search_schema,
)

_MOST_METADATA, _MOST_KEY, _MOST_VALUE = 16, 64, 512  # as at OpenAI
_LOGPROBS = 'message.output_text.logprobs'
# Changes nothing: reasoning comes as text, which may be sent back as it is.
_REASONING = 'reasoning.encrypted_content'

_Status = Literal['in_progress', 'completed', 'incomplete'] | None
_Unsupported = schema.Unsupported


def _kind(value: Any) -> str:
  """Returns the type of an item; a message need not name it."""
  if isinstance(value, dict):
    found = value.get('type')
  else:
    found = getattr(value, 'type', None)
  return found if isinstance(found, str) else 'message'


class InputText(schema.Body):
  """A text of a message."""

  type: Literal['input_text']
  text: str


class OutputText(schema.Body):
  """A text that a model wrote; annotations and logprobs are not read."""

  type: Literal['output_text']
  text: str
  annotations: list[Any] | None = None
  logprobs: list[Any] | None = None


class RefusalText(schema.Body):
  """A text with which a model declined."""

  type: Literal['refusal']
  refusal: str


class ThoughtText(schema.Body):
  """A text that a model wrote before its answer."""

  type: Literal['reasoning_text', 'summary_text']
  text: str


_Part = Annotated[
  InputText | OutputText | RefusalText,
  pydantic.Discriminator('type'),
  schema.known('input_text', 'output_text', 'refusal', key='type'),
]


class InputMessage(schema.Body):
  """A message of a conversation."""

  type: Literal['message'] | None = None
  id: str | None = None
  role: Literal['user', 'assistant', 'system', 'developer']
  content: str | Annotated[list[_Part], schema.FEW]
  status: _Status = None


class InputCall(schema.Body):
  """A call of a function, as the model made it."""

  type: Literal['function_call']
  id: str | None = None
  call_id: str
  name: str
  arguments: str
  status: _Status = None


_OutputPart = Annotated[InputText, schema.known('input_text', key='type')]


class InputCallOutput(schema.Body):
  """The result of a call."""

  type: Literal['function_call_output']
  id: str | None = None
  call_id: str
  output: str | Annotated[list[_OutputPart], schema.FEW]
  status: _Status = None


class InputReasoning(schema.Body):
  """The reasoning before an answer or a call."""

  type: Literal['reasoning']
  id: str | None = None
  summary: Annotated[list[ThoughtText], schema.FEW] | None = None
  content: Annotated[list[ThoughtText], schema.FEW] | None = None
  encrypted_content: Annotated[
    Any, _Unsupported('reasoning is not encrypted here')
  ] = None
  status: _Status = None


Item = Annotated[
  Annotated[InputMessage, pydantic.Tag('message')]
  | Annotated[InputCall, pydantic.Tag('function_call')]
  | Annotated[InputCallOutput, pydantic.Tag('function_call_output')]
  | Annotated[InputReasoning, pydantic.Tag('reasoning')],
  pydantic.Discriminator(_kind),
  schema.known(
    'message', 'function_call', 'function_call_output', 'reasoning', key='type'
  ),
]


class FunctionTool(schema.Body):
  """A function that the model may call."""

  type: Literal['function']
  name: str
  description: str | None = None
  parameters: dict[str, Any] | None = None
  strict: bool | None = pydantic.Field(
    default=None, description='Whether arguments are of the schema.'
  )


class ChosenFunction(schema.Body):
  """The function that is called."""

  type: Literal['function']
  name: str


ToolChoice = Annotated[
  Literal['none', 'auto', 'required'] | ChosenFunction,
  schema.known('none', 'auto', 'required'),
  schema.known('function', key='type'),
]


_Tool = Annotated[FunctionTool, schema.known('function', key='type')]


class TextOptions(schema.Body):
  """Options of the answer's text."""

  format: format_schema.TextFormat | None = pydantic.Field(
    default=None, description=format_schema.JSON_FORMATS
  )
  verbosity: Annotated[
    Any, _Unsupported('no model here was trained for it', ('medium',))
  ] = None


class ReasoningOptions(search_schema.Reasoning):
  """Limits and options of the reasoning."""

  summary: Annotated[Any, _Unsupported('reasoning comes whole')] = None
  generate_summary: Annotated[Any, _Unsupported('reasoning comes whole')] = None


class EventOptions(schema.Body):
  """Options of a stream."""

  include_obfuscation: Annotated[
    Any, _Unsupported('events are not padded', (False,))
  ] = None


class ResponseRequest(schema.Body):
  """The body of POST /v1/responses; null means the default."""

  most_lists: ClassVar[int] = 8192
  limits: ClassVar[dict[str, dict[str, Any]]] = {
    'max_output_tokens': {'minimum': 1},
    'top_logprobs': {'minimum': 0, 'maximum': 20},
    'metadata': {'maxProperties': _MOST_METADATA},
  }

  model: str = pydantic.Field(description='A name of /v1/models.')
  input: str | Annotated[list[Item], schema.TURNS] = pydantic.Field(
    description='A text of the user, or the items of a conversation.'
  )
  instructions: str | None = pydantic.Field(
    default=None,
    description='A system message before all items. The next response does not'
    ' take it over.',
  )
  previous_response_id: str | None = pydantic.Field(
    default=None,
    description='A stored response, whose items and output come first.',
  )
  store: bool | None = pydantic.Field(
    default=None,
    description='Whether input and output are kept, to be read or continued by'
    ' the id; null: true, if the server keeps responses.',
  )
  stream: bool | None = pydantic.Field(
    default=None, description='Answers with server-sent events.'
  )
  stream_options: EventOptions | None = pydantic.Field(
    default=None, description='Only with stream.'
  )
  max_output_tokens: int | None = pydantic.Field(
    default=None, description='Most tokens to generate, reasoning included.'
  )
  temperature: float | None = None
  top_p: float | None = None
  tools: Annotated[list[_Tool], schema.FEW] | None = pydantic.Field(
    default=None, description='Functions that the model may call.'
  )
  tool_choice: ToolChoice | None = pydantic.Field(
    default=None, description=chat_schema.TOOL_CHOICE
  )
  parallel_tool_calls: bool | None = pydantic.Field(
    default=None, description='Whether it may make several calls at once.'
  )
  text: TextOptions | None = pydantic.Field(
    default=None, description='Options of the text.'
  )
  reasoning: ReasoningOptions | None = pydantic.Field(
    default=None, description='Limits and options of the reasoning.'
  )
  strategy: search_schema.Strategy | None = pydantic.Field(
    default=None, description=search_schema.STRATEGY
  )
  budget: search_schema.Budget | None = pydantic.Field(
    default=None, description=search_schema.BUDGET
  )
  include: (
    Annotated[
      list[
        Annotated[
          Literal[
            'message.output_text.logprobs', 'reasoning.encrypted_content'
          ],
          schema.known(_LOGPROBS, _REASONING),
        ]
      ],
      schema.FEW,
    ]
    | None
  ) = pydantic.Field(
    default=None,
    description=f'Additions to the output. {_REASONING} changes nothing:'
    ' reasoning comes as text, and may be sent back.',
  )
  top_logprobs: int | None = pydantic.Field(
    default=None,
    description=f'Most probable tokens beside each token; with {_LOGPROBS}.',
  )
  metadata: dict[str, str] | None = pydantic.Field(
    default=None, description='Kept with the response, and returned.'
  )
  user: str | None = pydantic.Field(
    default=None, description="Written to the server's log."
  )
  safety_identifier: str | None = pydantic.Field(
    default=None, description="Written to the server's log."
  )
  background: Annotated[
    Any, _Unsupported('a response is made while its client waits', (False,))
  ] = None
  truncation: Annotated[
    Any, _Unsupported('nothing is cut silently', ('disabled',))
  ] = None
  service_tier: Annotated[
    Any, _Unsupported('there is one tier', ('auto', 'default'))
  ] = None
  prompt_cache_retention: Annotated[
    Any, _Unsupported('prompts are cached in memory', ('in_memory',))
  ] = None
  prompt_cache_key: Annotated[
    Any, _Unsupported('prompts are found by their content')
  ] = None
  prompt_cache_options: Annotated[
    Any, _Unsupported('prompts are found by their content')
  ] = None
  max_tool_calls: Annotated[
    Any, _Unsupported('the server calls no tool itself')
  ] = None
  conversation: Annotated[
    Any, _Unsupported('continue by previous_response_id')
  ] = None
  context_management: Annotated[
    Any, _Unsupported('the context is not compacted')
  ] = None
  prompt: Annotated[Any, _Unsupported('no prompts are stored')] = None
  moderation: Annotated[Any, _Unsupported('no moderation')] = None
  image: Annotated[Any, _Unsupported('texts only')] = None
  background_options: Annotated[Any, _Unsupported('no background')] = None
  access_programs: Annotated[Any, _Unsupported('no such programs')] = None

  def check(self) -> None:
    """Refuses what the types allow, but this server does not support.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    self.refuse_unsupported()
    if self.stream_options is not None and not self.stream:
      raise errors.invalid(
        'stream_options', 'got options without stream, expected stream: true'
      )
    if self.max_output_tokens is not None and self.max_output_tokens < 1:
      raise errors.invalid(
        'max_output_tokens',
        f'got {self.max_output_tokens}, expected at least 1',
      )
    if self.top_logprobs is not None and not self.has_logprobs:
      raise errors.invalid(
        'top_logprobs', f'got it alone, expected include: [{_LOGPROBS!r}] too'
      )
    search_schema.check(self)
    if self.input == []:
      raise errors.invalid('input', 'got no items, expected at least one')
    self._check_metadata()

  def language(self) -> format_schema.Language | None:
    """Returns the language of the text; None: any text.

    Raises:
      ApiError: status 400, the schema is too long.
    """
    found = self.text.format if self.text else None
    return format_schema.of_format(found, 'text')

  @property
  def is_constrained(self) -> bool:
    """Whether a grammar is compiled for the answer."""
    found = self.text.format if self.text else None
    is_formatted = found is not None and found.type != 'text'
    has_cap = self.reasoning is not None and self.reasoning.is_limited
    return is_formatted or self.tool_use().is_held or has_cap

  def tool_use(self) -> format_schema.ToolUse:
    """Returns the tools that may or must be called.

    Raises:
      ApiError: status 400, the one that must be is not there.
    """
    choice = self.tool_choice or 'auto'
    is_name = isinstance(choice, ChosenFunction)
    return format_schema.tool_use(
      self.tools or (),
      choice='required' if is_name else choice,
      only=choice.name if is_name else None,
      is_single=self.parallel_tool_calls is False,
      place='parameters',
    )

  @property
  def is_search(self) -> bool:
    """Whether a strategy answers."""
    return search_schema.is_search(self)

  @property
  def has_logprobs(self) -> bool:
    """Whether log-probabilities are asked for."""
    return _LOGPROBS in (self.include or ())

  def items(self) -> list[dict[str, Any]]:
    """Returns the items as JSON, each with its type."""
    if isinstance(self.input, str):
      return [{'type': 'message', 'role': 'user', 'content': self.input}]
    return [
      {'type': 'message', **each.model_dump(exclude_none=True)}
      for each in self.input
    ]

  def _check_metadata(self) -> None:
    found = self.metadata or {}
    if len(found) > _MOST_METADATA or any(
      len(key) > _MOST_KEY or len(value) > _MOST_VALUE
      for key, value in found.items()
    ):
      raise errors.invalid(
        'metadata',
        f'got {len(found)} entries, expected at most {_MOST_METADATA}, keys of'
        f' at most {_MOST_KEY} characters and values of {_MOST_VALUE}',
      )
