"""The body of POST /v1/completions.

It has every field that clients of OpenAI's completions API send, and the
settings and languages that vLLM's clients send.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import pydantic

from inference.sampling import settings
from inference.server.api import errors, format_schema, schema


class _OpenAiRequest(format_schema.Languages):
  model: str = pydantic.Field(description='A name of /v1/models.')
  prompt: schema.Prompts = pydantic.Field(
    description='One prompt or several: texts, or token ids as they are.'
  )
  max_tokens: int | None = pydantic.Field(
    default=None,
    description='Most tokens to generate; null: as the model recommends, else'
    ' as many as fit; 0, with echo: only the prompt is scored.',
  )
  temperature: float | None = None
  top_p: float | None = None
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  logit_bias: Annotated[dict[str, float], schema.FEW] | None = None
  logprobs: int | None = None  # 0: of the sampled tokens only
  seed: int | None = None
  stop: str | schema.Strings | None = None
  n: int | None = None
  echo: bool | None = pydantic.Field(
    default=None, description='Repeats the prompt before the completion.'
  )
  stream: bool | None = pydantic.Field(
    default=None, description='Answers with server-sent events.'
  )
  stream_options: schema.StreamOptions | None = pydantic.Field(
    default=None, description='Only with stream.'
  )
  user: str | None = pydantic.Field(
    default=None, description="Written to the server's log."
  )
  best_of: Annotated[Any, schema.Unsupported('ask for n and choose', (1,))] = (
    None
  )
  suffix: Annotated[
    Any, schema.Unsupported('the model was not trained to fill a gap')
  ] = None
  min_tokens: int | None = None  # vLLM's; here since `_check_scores` reads it


_VllmRequest = schema.with_settings(
  _OpenAiRequest, dataclasses.fields(settings.Settings)
)


class CompletionRequest(_VllmRequest):
  """The body of POST /v1/completions; null means the default.

  The default is what the frozen directory recommends, else the default in
  `inference.sampling.settings`.
  """

  most_lists: ClassVar[int] = 8192  # a JSON schema has many
  limits: ClassVar[dict[str, dict[str, Any]]] = {
    'max_tokens': {'minimum': 0},
    'n': {'maximum': schema.MAX_CHOICES},
    'priority': {
      'minimum': -schema.MAX_PRIORITY,
      'maximum': schema.MAX_PRIORITY,
    },
  }

  # vLLM's fields that are no settings.
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
      is_shared: whether the server has API keys. A request may then lower its
        priority, but not raise it above that of other principals.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    schema.check_common(self, is_shared=is_shared)
    if not 1 <= len(self.prompts()) <= schema.MAX_PROMPTS:
      raise errors.invalid(
        'prompt',
        f'got {len(self.prompts())} prompts, expected 1 to'
        f' {schema.MAX_PROMPTS}; send several requests',
      )
    self._check_scores()

  def _check_scores(self) -> None:
    if self.max_tokens == 0 and (not self.echo or self.min_tokens):
      raise errors.invalid(
        'max_tokens',
        'got 0, expected at least 1, or 0 with echo and without min_tokens, to'
        ' score a prompt',
      )
    if self.return_tokens_as_token_ids and self.logprobs is None:
      raise errors.invalid(
        'return_tokens_as_token_ids',
        'got true without logprobs, expected both or neither: tokens are'
        ' returned in logprobs',
      )
    if self.stream and self.echo and self.logprobs is not None:
      raise errors.invalid(
        'stream',
        'got a stream with both echo and logprobs, expected at most one of'
        ' them; leave stream out to get the logprobs of the prompt',
      )

  def prompts(self) -> list[str | list[int]]:
    """Returns the prompts as a list."""
    return schema.as_prompts(self.prompt)

  def chosen(self) -> dict[str, Any]:
    """Returns the settings of the request; None means not chosen.

    Raises:
      SettingError: a key of logit_bias is no token id.
    """
    chosen = schema.chosen_settings(self)
    if self.max_tokens == 0:
      # The engine generates at least one token; `completions` drops it.
      chosen['max_tokens'] = 1
    return chosen
