"""The answer to a request of /v1/responses.

The items of the conversation become the messages of a chat, and the events of
the chat's answer become the events of a response. The answer without a stream
is the sum of the same events.
"""

from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Sequence
import logging
import time
from typing import Any

from checks import expect
from inference import generate
from inference.constraints import thinking
from inference.requests import requests as requests_lib
from inference.sampling import (
  logprobs as logprobs_lib,
  settings as settings_lib,
)
from inference.server.answers import (
  chat,
  chat_logprobs,
  completions,
  conversations,
  response_events,
  response_items,
)
from inference.server.api import (
  errors,
  format_schema,
  response_schema,
  search_schema,
)
from inference.server.http import exchanges
from inference.server.records import responses as store_lib
from inference.server.versions import fingerprint
from text.replies import events as events_lib

_LOG = logging.getLogger('uvicorn.error')
_NAMES = {
  'max_tokens': 'max_output_tokens',
  'logprobs': 'top_logprobs',
}  # of settings, in the body

Updates = AsyncIterable[tuple[int, requests_lib.Update]]


class Answer:
  """The answer to one request, whole or as a stream of events."""

  def __init__(
    self,
    generator: generate.Generator,
    body: response_schema.ResponseRequest,
    *,
    principal: str,
    before: Sequence[dict[str, Any]] = (),
    is_stored: bool,
    reply_format: str,
    efforts: dict[str, int | None],
  ):
    """Checks the conversation and the settings.

    Args:
      generator: its engine will answer.
      body: checked.
      principal: owner of the API key that the request has.
      before: the items of the response that this one continues.
      is_stored: whether the response will be kept.
      reply_format: format of the answers, see `text.replies.detection`.
      efforts: most tokens of reasoning by effort, None for no limit.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    self._body, self._principal = body, principal
    items = body.items()
    self._input = response_items.identified(items)
    self._asked = conversations.ask(
      generator,
      response_items.messages(body.instructions, [*before, *items]),
      tools=_tools(body),
      is_single=body.parallel_tool_calls is False,
      reply_format=reply_format,
      param='input',
    )
    param, most = search_schema.most_reasoning(efforts, body.reasoning)
    cap = self._asked.cap(param, most)
    self.requests = [self._request(generator, cap)]
    self.receipt: dict[str, Any] | None = None  # of a search
    self._writer = response_events.Writer(
      self._begun(generator, is_stored=is_stored)
    )
    self._logprobs = (
      chat_logprobs.ChatLogprobs(generator.tokenizer, as_ids=False)
      if body.has_logprobs
      else None
    )
    # Ids and log-probabilities of tokens, by the tokens' numbers in events.
    self._tokens: list[tuple[int, logprobs_lib.TokenLogprobs]] = []
    self._reasoning_tokens: set[int] = set()

  @property
  def asked(self) -> conversations.Asked:
    """The prompt, and what its answers may have."""
    return self._asked

  @property
  def body(self) -> response_schema.ResponseRequest:
    """The body of the request."""
    return self._body

  @property
  def is_stream(self) -> bool:
    """Whether the client wants events."""
    return bool(self._body.stream)

  @property
  def response(self) -> dict[str, Any]:
    """The response so far."""
    return self._writer.response

  @property
  def size(self) -> int:
    """Tokens of the prompt and the answer."""
    usage = self.response['usage']
    return usage['total_tokens'] if usage else len(self._asked.ids)

  def row(self) -> store_lib.Row:
    """Returns the finished response as it is kept."""
    return store_lib.Row.of(self.response, self._input)

  async def events(
    self, updates: Updates
  ) -> AsyncGenerator[response_events.Event]:
    """Yields the events; `response` is finished before the last one."""
    for event in self._writer.begin():
      yield event
    reader = self._asked.reader()
    async for _, update in updates:
      if self._logprobs:
        self._tokens += zip(update.token_ids, update.logprobs, strict=True)
      for found in reader.read(update):
        for event in self._written(found, update.completion):
          yield event

  def failed(self, message: str) -> Iterator[response_events.Event]:
    """Yields the events of a generation that failed."""
    return self._writer.fail(message)

  def _written(
    self, found: events_lib.Event, completion: requests_lib.Completion | None
  ) -> Iterator[response_events.Event]:
    writer = self._writer
    match found:
      case events_lib.Text():
        return writer.text(found.text, self._entries(found.tokens))
      case events_lib.Reasoning():
        self._reasoning_tokens.update(found.tokens)
        return writer.reasoning(found.text)
      case events_lib.ToolCall():
        call_id = chat.new_call_id(is_short=self._asked.has_short_ids)
        return writer.call(found.name, call_id)
      case events_lib.Arguments():
        return writer.arguments(found.text)
    assert completion
    if completion.finish_reason == 'error':
      return writer.fail(completions.failure(completion))
    usage = self._usage(completion)
    _LOG.info(
      '%s principal=%s user=%s %s',
      self.response['id'],
      expect.shown(self._principal),
      expect.shown(self._body.safety_identifier or self._body.user),
      usage,
    )
    return writer.end(found.finish_reason, usage)

  def _entries(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
    if not self._logprobs:
      return []
    tokens = (self._tokens[number] for number in numbers)
    return self._logprobs.write(tokens)['content']

  def _request(
    self, generator: generate.Generator, cap: thinking.Cap | None
  ) -> requests_lib.Request:
    body = self._body
    language = self._asked.language(body.language(), body.tool_use())
    chosen = {
      'temperature': body.temperature,
      'top_p': body.top_p,
      'max_tokens': body.max_output_tokens,
      'logprobs': (body.top_logprobs or 0) if body.has_logprobs else None,
      'n': 1,
    }
    if language:
      chosen['constraint'] = language.constraint
    try:
      with format_schema.refusals(language.param if language else ''):
        settings = self._asked.settings(chosen)
        return generator.request(
          self._asked.ids,
          settings,
          principal=self._principal,
          thinking=cap,
        )
    except settings_lib.SettingError as error:
      name = _NAMES.get(error.setting, error.setting)
      message = str(error).removeprefix(f'{error.setting}: ')
      raise errors.invalid(name, message) from error
    except ValueError as error:
      raise errors.refused_prompt(error, 'input') from error

  def _begun(
    self, generator: generate.Generator, *, is_stored: bool
  ) -> dict[str, Any]:
    """Returns the response before its first item."""
    body, settings = self._body, self.requests[0].settings
    tools = [each.model_dump(exclude_none=True) for each in body.tools or ()]
    return {
      'id': exchanges.current().answer_id('resp_'),
      'object': 'response',
      'created_at': int(time.time()),
      'completed_at': None,
      'status': 'in_progress',
      'background': False,
      'error': None,
      'incomplete_details': None,
      'instructions': body.instructions,
      'max_output_tokens': body.max_output_tokens,
      'metadata': body.metadata or {},
      'model': body.model,
      'output': [],
      'parallel_tool_calls': body.parallel_tool_calls is not False,
      'previous_response_id': body.previous_response_id,
      'reasoning': {'effort': None, 'summary': None} | _limits(body),
      'service_tier': 'default',
      'store': is_stored,
      'temperature': settings.temperature,
      'text': {'format': _format(body)},
      'tool_choice': _choice(body),
      'tools': [
        {'parameters': None, 'strict': False, **each} for each in tools
      ],
      'top_logprobs': body.top_logprobs or 0,
      'top_p': settings.top_p,
      'truncation': 'disabled',
      'usage': None,
      'user': body.user,
      # The weights, as in the answers of other routes.
      'system_fingerprint': fingerprint.of(generator),
    }

  def _usage(self, completion: requests_lib.Completion) -> dict[str, Any]:
    num_prompt = completion.num_prompt_tokens
    num_made = completion.num_completion_tokens
    extra = {}
    if self.receipt:
      # A client pays for what was discarded, too.
      num_made = search_schema.num_sampled(self.receipt)
      extra = {'receipt': self.receipt}
    return {
      'input_tokens': num_prompt,
      'input_tokens_details': {
        'cached_tokens': completion.usage.cached_tokens,
        'cache_write_tokens': 0,  # writing into the cache costs nothing
      },
      'output_tokens': num_made,
      'output_tokens_details': {
        'reasoning_tokens': len(self._reasoning_tokens),
        # Of drafts, under the names that usage of chats has.
        'accepted_prediction_tokens': completion.usage.accepted_tokens,
        'rejected_prediction_tokens': completion.usage.rejected_tokens,
      },
      'total_tokens': num_prompt + num_made,
      **extra,
    }


def _choice(body: response_schema.ResponseRequest) -> Any:
  """Returns the choice of tools as a response repeats it."""
  found = body.tool_choice or 'auto'
  return found if isinstance(found, str) else found.model_dump()


def _format(body: response_schema.ResponseRequest) -> dict[str, Any]:
  """Returns the format of the text as a response repeats it."""
  found = body.text.format if body.text else None
  if found is None:
    return {'type': 'text'}
  return found.model_dump(by_alias=True, exclude_none=True)


def _tools(body: response_schema.ResponseRequest) -> list[dict[str, Any]]:
  """Returns the tools that the model sees, in the shape of a chat."""
  if body.tool_choice == 'none':
    return []
  return [
    {
      'type': 'function',
      'function': tool.model_dump(
        include={'name', 'description', 'parameters'}, exclude_none=True
      ),
    }
    for tool in body.tools or ()
  ]


def _limits(body: response_schema.ResponseRequest) -> dict[str, Any]:
  """Returns the limits of the reasoning that the body has."""
  if body.reasoning is None:
    return {}
  return body.reasoning.model_dump(
    include={'effort', 'budget'}, exclude_none=True
  )
