"""The body of POST /v1/chat/completions.

It has every field of OpenAI's chat API, implemented or refused by name, and the
settings that /v1/completions has. Messages have text; pictures and sounds are
refused.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from inference.sampling import settings
from inference.server.api import (
  errors,
  format_schema,
  schema,
  search_schema,
)

_MOST_TOOLS = 128  # as at OpenAI
_Unsupported = schema.Unsupported

_CHOICES = 'none', 'auto', 'required'
TOOL_CHOICE = (
  'none: the model sees no tools; auto: it may call them; required: it calls'
  ' one at least; or the one that it calls. Arguments are held to the schema of'
  ' a tool with strict, and of any tool that must be called unless strict is'
  ' false.'
)


class ChosenName(schema.Body):
  """The name of a function."""

  name: str


class ChosenTool(schema.Body):
  """The tool that is called."""

  type: Literal['function']
  function: ChosenName


ToolChoice = Annotated[
  Literal['none', 'auto', 'required'] | ChosenTool,
  schema.known(*_CHOICES),
  schema.known('function', key='type'),
]


class TextPart(schema.Body):
  """A part of a message."""

  type: Literal['text']
  text: str


class RefusalPart(schema.Body):
  """A text with which a model declined."""

  type: Literal['refusal']
  refusal: str


_Part = Annotated[TextPart, schema.known('text', key='type')]
_SaidPart = Annotated[
  TextPart | RefusalPart,
  pydantic.Discriminator('type'),
  schema.known('text', 'refusal', key='type'),
]
_Content = str | Annotated[list[_Part], schema.FEW]


class FunctionCall(schema.Body):
  """The function that a model has called."""

  name: str
  arguments: str  # JSON
  # What the openai client has read in them; a call is sent back with it.
  parsed_arguments: Any = None


class ToolCall(schema.Body):
  """A call that a model has made."""

  id: str
  type: Literal['function'] = 'function'
  function: FunctionCall
  index: int | None = None  # of the call, as the pieces of a stream have it


class SystemMessage(schema.Body):
  """Instructions."""

  role: Literal['system', 'developer']
  content: _Content
  name: str | None = None


class UserMessage(schema.Body):
  """A message of the user."""

  role: Literal['user']
  content: _Content
  name: str | None = None


class AssistantMessage(schema.Body):
  """An answer of the model, as this server sends it."""

  role: Literal['assistant']
  content: str | Annotated[list[_SaidPart], schema.FEW] | None = None
  name: str | None = None
  refusal: str | None = None
  reasoning_content: str | None = None
  reasoning: str | None = None  # the same, as other servers name it
  tool_calls: Annotated[list[ToolCall], schema.FEW] | None = None
  parsed: Any = None  # what the openai client has read in the content
  audio: Annotated[Any, _Unsupported('text only')] = None
  function_call: Annotated[Any, _Unsupported('send tool_calls')] = None
  annotations: Annotated[Any, _Unsupported('text only', ([],))] = None


class ToolMessage(schema.Body):
  """The result of a call."""

  role: Literal['tool']
  content: _Content
  tool_call_id: str
  name: str | None = None


_ROLES = 'system', 'developer', 'user', 'assistant', 'tool'
Message = Annotated[
  SystemMessage | UserMessage | AssistantMessage | ToolMessage,
  pydantic.Discriminator('role'),
  schema.known(*_ROLES, key='role'),
]


class Function(schema.Body):
  """A function that the model may call."""

  name: str = pydantic.Field(pattern='^[a-zA-Z0-9_.-]{1,64}$')
  description: str | None = None
  parameters: dict[str, Any] | None = None
  strict: bool | None = pydantic.Field(
    default=None, description='Whether arguments are of the schema.'
  )


class Tool(schema.Body):
  """A tool of the request."""

  type: Literal['function']
  function: Function


class StreamOptions(schema.StreamOptions):
  """Options of a stream."""

  include_obfuscation: Annotated[
    Any, _Unsupported('events are not padded', (False,))
  ] = None


class _OpenAiChat(format_schema.Languages):
  model: str = pydantic.Field(description='A name of /v1/models.')
  messages: Annotated[list[Message], schema.TURNS] = pydantic.Field(
    description='The conversation, oldest first.'
  )
  max_tokens: int | None = pydantic.Field(
    default=None,
    description='Most tokens to generate, reasoning included; null: as the'
    ' model recommends, else as many as fit.',
  )
  max_completion_tokens: int | None = pydantic.Field(
    default=None, description='The newer name of max_tokens.'
  )
  temperature: float | None = None
  top_p: float | None = None
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  logit_bias: Annotated[dict[str, float], schema.FEW] | None = None
  logprobs: bool | None = pydantic.Field(
    default=None,
    description='Returns the log-probabilities of the tokens of the text.',
  )
  top_logprobs: int | None = pydantic.Field(
    default=None,
    description='Most probable tokens beside each token; with logprobs.',
  )
  seed: int | None = None
  stop: str | schema.Strings | None = None
  n: int | None = None
  stream: bool | None = pydantic.Field(
    default=None, description='Answers with server-sent events.'
  )
  stream_options: StreamOptions | None = pydantic.Field(
    default=None, description='Only with stream.'
  )
  tools: (
    Annotated[
      list[Annotated[Tool, schema.known('function', key='type')]], schema.FEW
    ]
    | None
  ) = pydantic.Field(
    default=None,
    description='Functions that the model may call, if its template shows them'
    f' to it; at most {_MOST_TOOLS}.',
  )
  tool_choice: ToolChoice | None = pydantic.Field(
    default=None, description=TOOL_CHOICE
  )
  parallel_tool_calls: bool | None = pydantic.Field(
    default=None,
    description='Whether an answer may have several calls; false leaves out all'
    ' but the first.',
  )
  user: str | None = pydantic.Field(
    default=None, description="Written to the server's log."
  )
  safety_identifier: str | None = pydantic.Field(
    default=None, description="Written to the server's log."
  )
  store: Annotated[
    Any, _Unsupported('chats are not stored, see /v1/responses', (False,))
  ] = None
  metadata: Annotated[
    Any, _Unsupported('chats are not stored, see /v1/responses', ({},))
  ] = None
  modalities: Annotated[Any, _Unsupported('text only', (['text'],))] = None
  audio: Annotated[Any, _Unsupported('text only')] = None
  reasoning_effort: search_schema.Effort | None = pydantic.Field(
    default=None, description=search_schema.EFFORT
  )
  verbosity: Annotated[
    Any, _Unsupported('no model here was trained for it', ('medium',))
  ] = None
  prediction: Annotated[Any, _Unsupported('text is not predicted')] = None
  service_tier: Annotated[
    Any, _Unsupported('there is one tier', ('auto', 'default'))
  ] = None
  prompt_cache_key: Annotated[
    Any, _Unsupported('prompts are found by their content')
  ] = None
  prompt_cache_options: Annotated[
    Any, _Unsupported('prompts are found by their content')
  ] = None
  prompt_cache_retention: Annotated[
    Any, _Unsupported('prompts are cached in memory', ('in_memory',))
  ] = None
  web_search_options: Annotated[
    Any, _Unsupported('the server searches nothing')
  ] = None
  moderation: Annotated[Any, _Unsupported('no moderation')] = None
  functions: Annotated[Any, _Unsupported('send tools', ([],))] = None
  function_call: Annotated[Any, _Unsupported('send tool_choice')] = None


_VllmChat = schema.with_settings(
  _OpenAiChat, dataclasses.fields(settings.Settings)
)


class ChatRequest(_VllmChat):
  """The body of POST /v1/chat/completions; null means the default.

  The default is what the frozen directory recommends, else the default in
  `inference.sampling.settings`.
  """

  most_lists: ClassVar[int] = 8192
  limits: ClassVar[dict[str, dict[str, Any]]] = {
    'max_tokens': {'minimum': 1},
    'max_completion_tokens': {'minimum': 1},
    'top_logprobs': {'minimum': 0, 'maximum': settings.MAX_LOGPROBS},
    'n': {'maximum': schema.MAX_CHOICES},
    'priority': {
      'minimum': -schema.MAX_PRIORITY,
      'maximum': schema.MAX_PRIORITY,
    },
    'tools': {'maxItems': _MOST_TOOLS},
  }

  reasoning: search_schema.Reasoning | None = pydantic.Field(
    default=None, description='Limits of the reasoning.'
  )
  strategy: search_schema.Strategy | None = pydantic.Field(
    default=None, description=search_schema.STRATEGY
  )
  budget: search_schema.Budget | None = pydantic.Field(
    default=None, description=search_schema.BUDGET
  )

  # vLLM's fields that are no settings.
  chat_template_kwargs: dict[str, Any] | None = pydantic.Field(
    default=None,
    description='Variables of the chat template, such as enable_thinking.',
  )
  add_generation_prompt: bool | None = pydantic.Field(
    default=None,
    description='Whether the prompt ends with the start of an answer; null:'
    ' unless a message is continued.',
  )
  continue_final_message: bool | None = pydantic.Field(
    default=None,
    description='Whether the answer continues the last message.',
  )
  return_tokens_as_token_ids: bool | None = pydantic.Field(
    default=None,
    description='Names the tokens of logprobs token_id:ID; only with them.',
  )
  priority: int | None = pydantic.Field(
    default=None,
    description='A lower number is served sooner. With API keys, at least 0.',
  )

  def check(self, *, is_shared: bool) -> None:
    """Refuses values that the types allow, but this server does not support.

    Args:
      is_shared: whether the server has API keys.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    schema.check_common(self, is_shared=is_shared)
    if (self.n or 1) > schema.MAX_CHOICES:
      raise errors.invalid(
        'n', f'got {self.n}, expected at most {schema.MAX_CHOICES}'
      )
    if not self.messages:
      raise errors.invalid('messages', 'got none, expected at least one')
    for index, message in enumerate(self.messages):
      _check_message(f'messages[{index}]', message)
    for name in ('top_logprobs', 'return_tokens_as_token_ids'):
      if getattr(self, name) and not self.logprobs:
        raise errors.invalid(
          name, 'got it without logprobs, expected logprobs: true'
        )
    most = settings.MAX_LOGPROBS
    if not 0 <= (self.top_logprobs or 0) <= most:
      raise errors.invalid(
        'top_logprobs', f'got {self.top_logprobs}, expected 0 to {most}'
      )
    if None not in (both := (self.max_tokens, self.max_completion_tokens)) and (
      both[0] != both[1]
    ):
      raise errors.invalid(
        'max_completion_tokens',
        f'got {both[1]} and max_tokens {both[0]}, expected one of them: they'
        ' mean the same',
      )
    if self.add_generation_prompt and self.continue_final_message:
      raise errors.invalid(
        'continue_final_message',
        'got both it and add_generation_prompt, expected one of them',
      )
    self._check_tools()
    search_schema.check(self)

  def _check_tools(self) -> None:
    names = [tool.function.name for tool in self.tools or ()]
    if len(names) > _MOST_TOOLS:
      raise errors.invalid(
        'tools', f'got {len(names)}, expected at most {_MOST_TOOLS}'
      )
    if twice := sorted({name for name in names if names.count(name) > 1}):
      raise errors.invalid(
        'tools', f'got {twice[0]!r} twice, expected different names'
      )

  def tool_use(self) -> format_schema.ToolUse:
    """Returns the tools that may or must be called.

    Raises:
      ApiError: status 400, the one that must be is not there.
    """
    choice = self.tool_choice or 'auto'
    is_name = isinstance(choice, ChosenTool)
    return format_schema.tool_use(
      [tool.function for tool in self.tools or ()],
      choice='required' if is_name else choice,
      only=choice.function.name if is_name else None,
      is_single=self.parallel_tool_calls is False,
      place='function.parameters',
    )

  @property
  def is_constrained(self) -> bool:
    """Whether a grammar is compiled for the answer."""
    has_cap = bool(self.reasoning_effort or self.reasoning)
    return super().is_constrained or self.tool_use().is_held or has_cap

  @property
  def is_search(self) -> bool:
    """Whether a strategy answers."""
    return search_schema.is_search(self)

  def chosen(self) -> dict[str, Any]:
    """Returns the settings of the request; None means not chosen.

    Raises:
      SettingError: a key of logit_bias is no token id.
    """
    chosen = schema.chosen_settings(self)
    chosen['logprobs'] = (self.top_logprobs or 0) if self.logprobs else None
    if self.max_tokens is None:
      chosen['max_tokens'] = self.max_completion_tokens
    return chosen

  def conversation(self) -> list[dict[str, Any]]:
    """Returns the messages as JSON, each with one text or None."""
    return [_plain(message) for message in self.messages]


def _check_message(where: str, message: Any) -> None:
  is_answer = isinstance(message, AssistantMessage)
  if is_answer and not (
    message.tool_calls
    or isinstance(message.content or message.refusal, str)
    or message.content
  ):
    raise errors.invalid(
      where, 'got neither content nor tool_calls, expected one of them'
    )
  if isinstance(message.content, list) and not message.content:
    raise errors.invalid(where, 'got no parts, expected at least one')


def _plain(message: Any) -> dict[str, Any]:
  found = message.model_dump(exclude_none=True)
  content = message.content
  if isinstance(content, list):
    texts = [
      part.refusal if isinstance(part, RefusalPart) else part.text
      for part in content
    ]
    content = '\n'.join(texts)  # as vLLM joins them
  if isinstance(message, AssistantMessage):
    content = message.refusal if content is None else content
    thoughts = found.pop('reasoning', None)
    found.setdefault('reasoning_content', thoughts)
    for name in ('refusal', 'parsed'):
      found.pop(name, None)
  return {**found, 'content': content}
