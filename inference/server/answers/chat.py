"""The answer to a chat request, from a checked body to OpenAI's shapes.

A choice is the fold of the events of `text.replies`. A stream sends each event
as it comes; a whole answer sends the fold. So both say the same.

    {'message': {'role': 'assistant', 'content': text,
                 'reasoning_content': ..., 'tool_calls': [...]},
     'finish_reason': 'stop' | 'length' | 'tool_calls' | 'error'}

`content` is null if there are calls and no text. The fields seed, stop_reason,
accounting and error of a choice have the meaning of `answers.completions`.
"""

from collections.abc import AsyncGenerator, Sequence
import logging
import secrets
import string
import time
from typing import Any

from checks import expect
from inference import generate
from inference.constraints import thinking
from inference.requests import requests
from inference.sampling import logprobs, settings as settings_lib
from inference.server.answers import (
  chat_logprobs,
  completions,
  conversations,
)
from inference.server.api import (
  chat_schema,
  errors,
  format_schema,
  schema,
  search_schema,
)
from inference.server.http import exchanges
from inference.server.versions import fingerprint
from text.replies import events

_LOG = logging.getLogger('uvicorn.error')
_SHORT_ID, _ID = 9, 24  # characters


class Answer:
  """The answer to one request, whole or as a stream of chunks."""

  def __init__(
    self,
    generator: generate.Generator,
    body: chat_schema.ChatRequest,
    *,
    principal: str,
    reply_format: str,
    efforts: dict[str, int | None],
  ):
    """Checks the conversation and the settings.

    Args:
      generator: its engine will answer.
      body: body of the request.
      principal: owner of the API key that the request has.
      reply_format: format of the answers, see `text.replies.detection`.
      efforts: most tokens of reasoning by effort, None for no limit.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    self._body, self._principal = body, principal
    self._asked = _asked(generator, body, reply_format)
    param, most = search_schema.most_reasoning(
      efforts, body.reasoning, body.reasoning_effort
    )
    cap = self._asked.cap(param, most)
    self.requests = [_request(self._asked, body, principal, cap)]
    self._n = self.requests[0].settings.n
    self._writer = chat_logprobs.ChatLogprobs(
      generator.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)
    )
    self._choices = [self._new_choice() for _ in range(self._n)]
    self._updates: list[requests.Update] = []  # of an answer that waits
    self.receipt: dict[str, Any] | None = None  # of a search
    self._head = {
      'id': exchanges.current().answer_id('chatcmpl-'),
      'created': int(time.time()),
      'model': body.model,
      # The weights. With the seed of a choice they determine the text.
      'system_fingerprint': fingerprint.of(generator),
    }

  @property
  def asked(self) -> conversations.Asked:
    """The prompt, and what its answers may have."""
    return self._asked

  @property
  def body(self) -> chat_schema.ChatRequest:
    """The body of the request."""
    return self._body

  @property
  def is_stream(self) -> bool:
    """Whether the client wants chunks."""
    return bool(self._body.stream)

  @property
  def size(self) -> int:
    """Entries of a finished answer: tokens, and log-probabilities of each."""
    num_tokens = sum(len(update.token_ids) for update in self._updates)
    return num_tokens * (1 + (self._body.top_logprobs or 0))

  async def finish(self, updates: completions.Updates) -> None:
    """Waits for all choices of an answer that is not streamed."""
    async for _, update in updates:
      self._updates.append(update)

  def whole(self) -> dict[str, Any]:
    """Returns the body of an answer that is finished."""
    for update in self._updates:
      self._choices[update.index].take(update)
    usage = self._end()
    return {
      **self._head,
      'object': 'chat.completion',
      'choices': [
        {'index': index, **choice.whole()}
        for index, choice in enumerate(self._choices)
      ],
      'usage': usage,
    }

  async def chunks(
    self, updates: completions.Updates
  ) -> AsyncGenerator[dict[str, Any]]:
    """Yields the chunks of a stream."""
    options = self._body.stream_options
    with_usage = options is not None and options.include_usage
    # With include_usage, every chunk but the last has `usage: null`.
    head = {**self._head, 'object': 'chat.completion.chunk'}
    if with_usage:
      head['usage'] = None
    for index in range(self._n):
      delta = {'role': 'assistant', 'content': ''}
      yield {**head, 'choices': [_chunk(index, delta)]}
    async for _, update in updates:
      for fields in self._choices[update.index].chunks(update):
        yield {**head, 'choices': [{'index': update.index, **fields}]}
    usage = self._end()
    if with_usage:
      # Clients read usage only from a chunk without choices.
      yield {**head, 'choices': [], 'usage': usage}

  def _new_choice(self) -> '_Choice':
    writer = self._writer if self._body.logprobs else None
    return _Choice(self._asked, writer)

  def _end(self) -> dict[str, Any]:
    """Logs the answer; returns its usage."""
    usage = self._usage()
    user = self._body.user or self._body.safety_identifier
    _LOG.info(
      '%s principal=%s user=%s %s',
      self._head['id'],
      expect.shown(self._principal),
      expect.shown(user),
      usage,
    )
    return usage

  def _usage(self) -> dict[str, Any]:
    done = [each.completion for each in self._choices if each.completion]
    # The prompt counts once, however many choices it has.
    num_prompt = done[0].num_prompt_tokens
    num_made = sum(each.num_completion_tokens for each in done)
    extra = {}
    if self.receipt:
      # A client pays for what was discarded, too.
      num_made = search_schema.num_sampled(self.receipt)
      extra = {'receipt': self.receipt}
    num_thought = sum(
      len(each.reply.reasoning_tokens) for each in self._choices
    )
    return {
      'prompt_tokens': num_prompt,
      'completion_tokens': num_made,
      'total_tokens': num_prompt + num_made,
      'prompt_tokens_details': {'cached_tokens': done[0].usage.cached_tokens},
      'completion_tokens_details': {
        'reasoning_tokens': num_thought,
        'accepted_prediction_tokens': sum(
          each.usage.accepted_tokens for each in done
        ),
        'rejected_prediction_tokens': sum(
          each.usage.rejected_tokens for each in done
        ),
      },
      **extra,
    }


def _asked(
  generator: generate.Generator,
  body: chat_schema.ChatRequest,
  reply_format: str,
) -> conversations.Asked:
  tools = [
    # The model was trained without the word strict.
    each.model_dump(exclude_none=True, exclude={'function': {'strict'}})
    for each in body.tools or ()
  ]
  add = body.add_generation_prompt
  return conversations.ask(
    generator,
    body.conversation(),
    tools=[] if body.tool_choice == 'none' else tools,
    is_single=body.parallel_tool_calls is False,
    variables=body.chat_template_kwargs,
    add_generation_prompt=not body.continue_final_message
    if add is None
    else add,
    continue_final_message=bool(body.continue_final_message),
    reply_format=reply_format,
  )


def _request(
  asked: conversations.Asked,
  body: chat_schema.ChatRequest,
  principal: str,
  cap: thinking.Cap | None,
) -> requests.Request:
  chosen = body.chosen()
  language = asked.language(body.language(), body.tool_use())
  if language:
    chosen['constraint'] = language.constraint
  try:
    with format_schema.refusals(language.param if language else ''):
      return asked.generator.request(
        asked.ids,
        asked.settings(chosen),
        principal=principal,
        priority=body.priority or 0,
        thinking=cap,
      )
  except settings_lib.SettingError as error:
    refused = schema.from_setting(error)
    if refused.param == 'max_tokens' and body.max_tokens is None:
      message = str(refused).removeprefix('max_tokens: ')
      refused = errors.invalid('max_completion_tokens', message)
    raise refused from error
  except ValueError as error:
    raise errors.refused_prompt(error, 'messages') from error


class _Choice:
  """One choice as far as it has come."""

  def __init__(
    self,
    asked: conversations.Asked,
    writer: chat_logprobs.ChatLogprobs | None,
  ):
    self._reader, self._writer = asked.reader(), writer
    self._has_short_ids = asked.has_short_ids
    self._call_ids: list[str] = []
    # Ids and log-probabilities of tokens, by the tokens' numbers in events.
    self._tokens: list[tuple[int, logprobs.TokenLogprobs]] = []
    self.reply = events.Reply()
    self.completion: requests.Completion | None = None

  def take(self, update: requests.Update) -> list[events.Event]:
    """Folds the next update; returns its events."""
    if self._writer:
      self._tokens += zip(update.token_ids, update.logprobs, strict=True)
    self.completion = update.completion
    found = self._reader.read(update)
    for event in found:
      self.reply.add(event)
      if isinstance(event, events.ToolCall):
        self._call_ids.append(new_call_id(is_short=self._has_short_ids))
    return found

  def whole(self) -> dict[str, Any]:
    """Returns the fields of a finished choice."""
    reply = self.reply
    assert self.completion
    message: dict[str, Any] = {
      'role': 'assistant',
      'content': None if reply.calls and not reply.text else reply.text,
      'refusal': None,
    }
    if reply.reasoning:
      message['reasoning_content'] = reply.reasoning
    if reply.calls:
      message['tool_calls'] = [
        _call(id_, call.name, call.arguments)
        for id_, call in zip(self._call_ids, reply.calls, strict=True)
      ]
    return {
      'message': message,
      'logprobs': self._logprobs(reply.text_tokens),
      'finish_reason': reply.finish_reason,
      **completions.ending(self.completion),
    }

  def chunks(self, update: requests.Update) -> list[dict[str, Any]]:
    """Returns the fields of the chunks of the next update."""
    return [self._piece(event) for event in self.take(update)]

  def _piece(self, event: events.Event) -> dict[str, Any]:
    match event:
      case events.Text():
        found = self._logprobs(event.tokens)
        return _delta({'content': event.text}, logprobs=found)
      case events.Reasoning():
        return _delta({'reasoning_content': event.text})
      case events.ToolCall():
        call = _call(self._call_ids[event.index], event.name, '')
        return _delta({'tool_calls': [{'index': event.index, **call}]})
      case events.Arguments():
        function = {'arguments': event.text}
        call = {'index': event.index, 'function': function}
        return _delta({'tool_calls': [call]})
    assert self.completion
    ending = completions.ending(self.completion)
    return {**_delta({}), 'finish_reason': event.finish_reason, **ending}

  def _logprobs(self, numbers: Sequence[int]) -> dict[str, Any] | None:
    if not self._writer:
      return None
    return self._writer.write(self._tokens[number] for number in numbers)


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
  return {'index': index, **_delta(delta)}


def _delta(
  delta: dict[str, Any], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
  return {'delta': delta, 'logprobs': logprobs, 'finish_reason': None}


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
  function = {'name': name, 'arguments': arguments}
  return {'id': id_, 'type': 'function', 'function': function}


def new_call_id(*, is_short: bool) -> str:
  """Returns the id of a call; Mistral's templates want a short one."""
  letters = string.ascii_letters + string.digits
  size = _SHORT_ID if is_short else _ID
  random = ''.join(secrets.choice(letters) for _ in range(size))
  return random if is_short else f'call_{random}'
