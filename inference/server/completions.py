"""One completions request on its way: from a checked body to OpenAI's shapes.

Choices are numbered as OpenAI does: n of the first prompt, then n of the
second. All of a request's sequences are decoded as one batch.
"""

from collections.abc import AsyncGenerator, Generator
import contextlib
import dataclasses
import logging
import time
from typing import Any
import uuid

from inference import generate, settings as settings_lib
from inference.server import schema

# Uvicorn shows this logger; under another server it is an ordinary one.
_LOG = logging.getLogger('uvicorn.error')


class Answer:
  """Makes the answer to one request, whole or in chunks."""

  def __init__(
    self, generator: generate.Generator, body: schema.CompletionRequest
  ):
    self._generator = generator
    self._body = body
    self._prompts = [p for p in body.prompts() for _ in range(body.n or 1)]
    self._done: dict[int, generate.Completion] = {}
    self._head = {
      'id': f'cmpl-{uuid.uuid4().hex}',
      'object': 'text_completion',
      'created': int(time.time()),
      'model': body.model,
      # With the seed of a choice: what it takes to get the same text again.
      'system_fingerprint': generator.frozen.manifest.weights_digest[:16],
    }

  def start(self) -> Generator[generate.Update]:
    """Checks prompts and settings, and returns the generation, not yet run.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    try:
      settings = [self._settings(i, p) for i, p in enumerate(self._prompts)]
      return self._generator.updates(self._prompts, settings)
    except settings_lib.SettingError as error:
      raise schema.invalid(error.setting, str(error)) from error
    except ValueError as error:
      raise schema.invalid('prompt', str(error)) from error

  async def whole(
    self, updates: AsyncGenerator[generate.Update]
  ) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed."""
    async for update in updates:
      self._keep(update)
    choices = [
      self._choice(index, self._echo(index) + completion.text, completion)
      for index, completion in sorted(self._done.items())
    ]
    return {**self._head, 'choices': choices, 'usage': self._usage()}

  async def chunks(
    self, updates: AsyncGenerator[generate.Update]
  ) -> AsyncGenerator[dict[str, Any]]:
    """Yields the events of a stream, one per token that adds text."""
    options = self._body.stream_options
    with_usage = options is not None and options.include_usage
    # Clients that asked for usage find null everywhere but in its own event.
    head = {**self._head, 'usage': None} if with_usage else self._head
    if self._body.echo:
      for index in range(len(self._prompts)):
        choice = self._choice(index, self._echo(index), None)
        yield {**head, 'choices': [choice]}
    async with contextlib.aclosing(updates):
      async for update in updates:
        self._keep(update)
        if update.piece or update.completion:
          choice = self._choice(update.index, update.piece, update.completion)
          yield {**head, 'choices': [choice]}
    if with_usage:
      # Clients read usage only from an event without choices.
      yield {**head, 'choices': [], 'usage': self._usage()}

  def _settings(self, index: int, prompt) -> settings_lib.Settings:
    settings = self._generator.settings_for(prompt, **self._body.chosen())
    if settings.seed is None:
      return settings
    # Each choice of a prompt has a seed of its own; the first has the given.
    choice = index % (self._body.n or 1)
    seed = (settings.seed + choice) % settings_lib.NUM_SEEDS
    return dataclasses.replace(settings, seed=seed)

  def _keep(self, update: generate.Update) -> None:
    if update.completion is None:
      return
    self._done[update.index] = update.completion
    if len(self._done) == len(self._prompts):
      _LOG.info(
        '%s user=%r %s', self._head['id'], self._body.user, self._usage()
      )

  def _choice(
    self, index: int, text: str, completion: generate.Completion | None
  ) -> dict[str, Any]:
    choice = {
      'index': index,
      'text': text,
      'logprobs': None,
      'finish_reason': completion.finish_reason if completion else None,
    }
    if completion:
      choice['seed'] = completion.seed  # not OpenAI's
    return choice

  def _echo(self, index: int) -> str:
    if not self._body.echo:
      return ''
    prompt = self._prompts[index]
    if isinstance(prompt, str):
      return prompt
    return self._generator.tokenizer.decode(prompt)

  def _usage(self) -> dict[str, int]:
    # A prompt is read once however many choices are made of it.
    prompts = [
      completion.num_prompt_tokens
      for index, completion in self._done.items()
      if index % (self._body.n or 1) == 0
    ]
    num_sampled = sum(c.num_completion_tokens for c in self._done.values())
    return {
      'prompt_tokens': sum(prompts),
      'completion_tokens': num_sampled,
      'total_tokens': sum(prompts) + num_sampled,
    }
