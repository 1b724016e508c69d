"""The answer to a completions request, from a checked body to OpenAI's shapes.

Choices are numbered as OpenAI does: n of the first prompt, then n of the
second. Each choice is a sequence of the engine's running batch.

A choice whose finish_reason is 'error' ended early, because the model's numbers
were not finite there; its field `error` says so. Other choices are whole.

The last chunk of a choice has three fields that OpenAI does not have:

    seed          the same seed, settings and weights give the same text
    stop_reason   the stop string or id that ended the choice, as in vLLM
    accounting    the cost, see `inference.requests.requests.Usage`: tokens that
                  were computed or cached, floating-point operations, bytes of
                  pages times seconds, seconds of waiting, prefill and decoding
"""

from collections.abc import AsyncGenerator, AsyncIterable, Sequence
import dataclasses
import logging
import time
from typing import Any

from checks import expect
from inference import generate
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.server.answers import logprobs_json
from inference.server.api import (
  completion_schema,
  errors,
  format_schema,
  schema,
)
from inference.server.http import exchanges
from inference.server.versions import fingerprint

# Uvicorn shows this logger; under another server it is an ordinary one.
_LOG = logging.getLogger('uvicorn.error')

# Digests of models for which the warning about special tokens was logged.
_WARNED: set[str] = set()

Updates = AsyncIterable[tuple[int, requests.Update]]


class Answer:
  """The answer to one request, whole or as a stream of chunks."""

  def __init__(
    self,
    generator: generate.Generator,
    body: completion_schema.CompletionRequest,
    *,
    principal: str,
  ):
    """Checks prompts and settings.

    Args:
      generator: its engine will answer.
      body: body of the request.
      principal: owner of the API key that the request has.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    self._generator, self._body = generator, body
    self._principal = principal
    self._prompts = body.prompts()
    self._check_size()
    self._language = body.language()
    try:
      self.requests = [self._request(prompt) for prompt in self._prompts]
    except settings_lib.SettingError as error:
      raise schema.from_setting(error) from error
    except ValueError as error:
      raise errors.refused_prompt(error) from error
    _warn_of_special_tokens(generator, self._prompts)
    self._echoes = [self._echo(prompt) for prompt in self._prompts]
    self._places = [
      logprobs_json.prompt_places(
        generator.tokenizer, prompt, request.prompt_ids
      )
      if body.echo and self._wants_logprobs and isinstance(prompt, str)
      else None
      for prompt, request in zip(self._prompts, self.requests, strict=True)
    ]
    self._done: dict[int, requests.Completion] = {}
    self._head = {
      # The digits of `x-request-id`: both name the exchange.
      'id': exchanges.current().answer_id('cmpl-'),
      'object': 'text_completion',
      'created': int(time.time()),
      'model': body.model,
      # The version. With the seed of a choice it determines the text.
      'system_fingerprint': fingerprint.of(generator),
    }

  @property
  def is_stream(self) -> bool:
    """Whether the client wants chunks."""
    return bool(self._body.stream)

  @property
  def size(self) -> int:
    """Entries of a finished answer: tokens, and log-probabilities of each."""
    num_tokens = sum(len(each.prompt_ids) for each in self.requests)
    num_tokens += sum(
      each.num_completion_tokens for each in self._done.values()
    )
    return num_tokens * (1 + (self.requests[0].settings.logprobs or 0))

  async def finish(self, updates: Updates) -> None:
    """Waits for all choices of an answer that is not streamed."""
    async for which, update in updates:
      self._keep(which, update)

  def whole(self) -> dict[str, Any]:
    """Returns the body of an answer that is finished."""
    choices = [
      self._whole_choice(index, completion)
      for index, completion in sorted(self._done.items())
    ]
    return {**self._head, 'choices': choices, 'usage': self._usage()}

  async def chunks(self, updates: Updates) -> AsyncGenerator[dict[str, Any]]:
    """Yields the chunks of a stream, about one per token."""
    options = self._body.stream_options
    with_usage = options is not None and options.include_usage
    # With include_usage, every chunk but the last has `usage: null`.
    head = {**self._head, 'usage': None} if with_usage else self._head
    writers = [
      _Writer(self._logprobs_after(echo), len(echo))
      for echo in self._echoes
      for _ in range(self._n)
    ]
    if self._body.echo:
      for index in range(len(writers)):
        yield {**head, 'choices': [_choice(index, self._echo_of(index))]}
    async for which, update in updates:
      self._keep(which, update)
      index = which * self._n + update.index
      # A token whose text is held back is sent with the token that releases it.
      if update.token_ids or update.completion:
        choice = self._piece(index, update, writers[index])
        yield {**head, 'choices': [choice]}
    if with_usage:
      # Clients read usage only from a chunk without choices.
      yield {**head, 'choices': [], 'usage': self._usage()}

  def _check_size(self) -> None:
    """Refuses a request that is too large, before its text is looked at."""
    self._n = self._body.n or self._generator.defaults.n
    num = len(self._prompts) * self._n
    if num > schema.MAX_CHOICES:
      raise errors.invalid(
        'n',
        f'got {num} completions to make (prompts times n), expected at most'
        f' {schema.MAX_CHOICES}; send several requests',
      )
    try:
      for prompt in self._prompts:
        self._generator.check_length(prompt)
    except ValueError as error:
      raise errors.refused_prompt(error) from error

  def _request(self, prompt: generate.Prompt) -> requests.Request:
    body = self._body
    ids = self._generator.prompt_ids(prompt)  # once: it may be long
    chosen, language = body.chosen(), self._language
    if language:
      chosen['constraint'] = language.constraint
    settings = self._generator.settings_for(ids, **chosen)
    if body.echo and settings.logprobs is not None:
      settings = dataclasses.replace(
        settings, prompt_logprobs=settings.logprobs
      )
    with format_schema.refusals(language.param if language else ''):
      return self._generator.request(
        ids,
        settings,
        principal=self._principal,
        priority=body.priority or 0,
        # The engine needs a token after the prompt. A given target is not
        # sampled, so the prompt may fill the context.
        target=0 if self._is_echo_alone else None,
      )

  def _keep(self, which: int, update: requests.Update) -> None:
    if update.completion is None:
      return
    self._done[which * self._n + update.index] = update.completion
    if len(self._done) == len(self._prompts) * self._n:
      _LOG.info(
        '%s principal=%s user=%s %s',
        self._head['id'],
        expect.shown(self._principal),
        expect.shown(self._body.user),
        self._usage(),
      )

  @property
  def _is_echo_alone(self) -> bool:
    """Whether the request only scores its prompt."""
    return self._body.max_tokens == 0

  @property
  def _wants_logprobs(self) -> bool:
    return self.requests[0].settings.logprobs is not None

  def _whole_choice(
    self, index: int, completion: requests.Completion
  ) -> dict[str, Any]:
    echo = self._echo_of(index)
    text = '' if self._is_echo_alone else completion.text
    choice = _choice(index, echo + text, self._ended(completion))
    if not self._wants_logprobs:
      return choice
    if completion.finish_reason == 'error' and self._body.echo:
      return choice  # its prompt has no logprobs
    parts = []
    if self._body.echo:
      which = index // self._n
      # Only the first choice of a prompt has its logprobs: it is computed once.
      found = self._done[which * self._n].prompt_logprobs
      assert found is not None
      parts.append(
        self._logprobs_after('', is_continued=False).write(
          self.requests[which].prompt_ids,
          found,
          end=len(echo),
          places=self._places[which],
        )
      )
    if not self._is_echo_alone:
      assert completion.logprobs is not None
      parts.append(
        self._logprobs_after(echo).write(
          completion.token_ids, completion.logprobs, end=len(echo + text)
        )
      )
    choice['logprobs'] = logprobs_json.joined(*parts)
    return choice

  def _piece(
    self, index: int, update: requests.Update, writer: '_Writer'
  ) -> dict[str, Any]:
    completion = update.completion and self._ended(update.completion)
    if self._is_echo_alone:
      return _choice(index, '', completion)
    writer.end += len(update.text)
    choice = _choice(index, update.text, completion)
    if self._wants_logprobs:
      choice['logprobs'] = writer.logprobs.write(
        update.token_ids, update.logprobs, end=writer.end
      )
    return choice

  def _ended(self, completion: requests.Completion) -> requests.Completion:
    if not self._is_echo_alone or completion.finish_reason == 'error':
      return completion
    return dataclasses.replace(
      completion, finish_reason='length', stop_reason=None
    )

  def _logprobs_after(
    self, text: str, *, is_continued: bool = True
  ) -> logprobs_json.LogprobsWriter:
    return logprobs_json.LogprobsWriter(
      self._generator.tokenizer,
      as_ids=bool(self._body.return_tokens_as_token_ids),
      offset=len(text),
      is_continued=is_continued,
    )

  def _echo(self, prompt: generate.Prompt) -> str:
    if not self._body.echo:
      return ''
    if isinstance(prompt, str):
      return prompt
    return self._generator.tokenizer.decode(prompt)

  def _echo_of(self, index: int) -> str:
    return self._echoes[index // self._n]

  def _usage(self) -> dict[str, Any]:
    # A prompt counts once, however many choices it has.
    firsts = [self._done[i] for i in sorted(self._done) if i % self._n == 0]
    num_prompt = sum(each.num_prompt_tokens for each in firsts)
    num_made = sum(each.num_completion_tokens for each in self._done.values())
    if self._is_echo_alone:
      num_made = 0
    return {
      'prompt_tokens': num_prompt,
      'completion_tokens': num_made,
      'total_tokens': num_prompt + num_made,
      'prompt_tokens_details': {
        'cached_tokens': sum(each.usage.cached_tokens for each in firsts)
      },
    }


@dataclasses.dataclass
class _Writer:
  """The progress of the stream of one choice."""

  logprobs: logprobs_json.LogprobsWriter
  end: int  # characters that were sent


def _warn_of_special_tokens(
  generator: generate.Generator, prompts: Sequence[generate.Prompt]
) -> None:
  """Logs, once per model, that a prompt has special tokens as text."""
  model = generator.frozen.manifest.weights_digest
  texts = [prompt for prompt in prompts if isinstance(prompt, str)]
  if model in _WARNED:
    return
  for text in texts:
    if warning := generator.warning(text):
      _WARNED.add(model)
      _LOG.warning('%s Not logged again.', warning)
      return


def _choice(
  index: int, text: str, completion: requests.Completion | None = None
) -> dict[str, Any]:
  choice = {
    'index': index,
    'text': text,
    'logprobs': None,
    'finish_reason': completion.finish_reason if completion else None,
  }
  return choice | ending(completion) if completion else choice


def ending(completion: requests.Completion) -> dict[str, Any]:
  """Returns the fields that only the end of a choice has."""
  fields = {
    'stop_reason': completion.stop_reason,
    'seed': completion.seed,
    'accounting': dataclasses.asdict(completion.usage),
  }
  if completion.finish_reason == 'error':
    fields['error'] = f'{failure(completion)}; the text ends before that'
  return fields


def failure(completion: requests.Completion) -> str:
  """Returns why a completion ended with an error."""
  if completion.failure:
    return f'the grammar has no next token: {completion.failure}'
  return 'the model computed numbers that are not finite'
