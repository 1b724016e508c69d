"""What the server accepts, and how it refuses.

Every field that clients of OpenAI's completions API send is here: implemented,
or refused unless it holds the value that changes nothing. So are those of
vLLM's that `inference.sampling.settings` has. A field that is not here is
refused too. Nothing is ignored.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import responses
import pydantic

from inference.sampling import settings

MAX_PROMPTS = 128  # of one request, as lm-eval's batches are
MAX_CHOICES = 128  # prompts times n

# Fields that are refused unless absent, null, or one of these.
_NEUTRAL: dict[str, tuple[Any, ...]] = {'best_of': (1,), 'suffix': ()}
# Settings that the API calls otherwise.
_API_NAMES = {'stop_ids': 'stop_token_ids'}
_MAX_PRIORITY = 2**31 - 1
_RETRY_AFTER_SECONDS = 1
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


class ApiError(Exception):
  """An answer other than 200, in OpenAI's shape."""

  def __init__(
    self, status: int, message: str, *, param: str | None, code: str | None
  ):
    super().__init__(message)
    self.status = status
    self.param = param
    self.code = code

  def body(self) -> dict[str, Any]:
    """Returns the JSON body."""
    ours = 'server_error' if self.status >= 500 else 'invalid_request_error'
    return {
      'error': {
        'message': str(self),
        'type': _TYPES.get(self.status, ours),
        'param': self.param,
        'code': self.code,
      }
    }

  def response(self) -> responses.JSONResponse:
    """Returns the whole answer; clients retry where it says when."""
    headers = {}
    if self.status == 401:
      headers['www-authenticate'] = 'Bearer'
    if self.status in (429, 503):
      headers['retry-after'] = str(_RETRY_AFTER_SECONDS)
    return responses.JSONResponse(self.body(), self.status, headers)


class _Model(pydantic.BaseModel):
  # Strict: '0.5' is not a number and true is not 1.
  model_config = pydantic.ConfigDict(extra='forbid', strict=True)


class StreamOptions(_Model):
  """How a stream is sent."""

  include_usage: bool = False


class CompletionRequest(_Model):
  """The body of POST /v1/completions; null means the default.

  The default is what the frozen directory recommends, else what
  `inference.sampling.settings` says.
  """

  model: str
  prompt: str | list[str] | list[int] | list[list[int]]
  max_tokens: int | None = None  # 0, with echo: the prompt alone
  temperature: float | None = None
  top_p: float | None = None
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  logit_bias: dict[str, float] | None = None
  logprobs: int | None = None  # 0: of the chosen tokens alone
  seed: int | None = None
  stop: str | list[str] | None = None
  n: int | None = None
  echo: bool | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None  # goes to the server's log, as it is meant to

  # Not OpenAI's; of these names and meanings in vLLM.
  top_k: int | None = None
  min_p: float | None = None
  repetition_penalty: float | None = None
  min_tokens: int | None = None
  ignore_eos: bool | None = None
  stop_token_ids: list[int] | None = None
  return_tokens_as_token_ids: bool | None = None
  priority: int | None = None  # lower is sooner; see `check`

  best_of: Any = None
  suffix: Any = None

  def check(self, *, is_shared: bool) -> None:
    """Refuses what the types allow and this server does not do.

    Args:
      is_shared: whether the server tells principals apart. Then nobody comes
        before others on their own word: a priority may only be let others pass.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    for name, neutral in _NEUTRAL.items():
      value = getattr(self, name)
      if value is not None and value not in neutral:
        expected = ' or '.join(map(repr, (None, *neutral)))
        raise ApiError(
          400,
          f'{name}: got {value!r}, expected {expected}; this server does not'
          ' support it, leave it out',
          param=name,
          code='unsupported_parameter',
        )
    if self.stream_options is not None and not self.stream:
      raise invalid(
        'stream_options', 'got options without stream, expected stream: true'
      )
    if self.n is not None and self.n < 1:
      raise invalid('n', f'got {self.n}, expected at least 1')
    if not 1 <= len(self.prompts()) <= MAX_PROMPTS:
      raise invalid(
        'prompt',
        f'got {len(self.prompts())} prompts, expected 1 to {MAX_PROMPTS}; send'
        ' several requests',
      )
    least = 0 if is_shared else -_MAX_PRIORITY
    if not least <= (self.priority or 0) <= _MAX_PRIORITY:
      raise invalid(
        'priority',
        f'got {self.priority}, expected {least} to {_MAX_PRIORITY}; 0 is what'
        ' others have, and more comes later',
      )
    self._check_scores()

  def _check_scores(self) -> None:
    if self.max_tokens == 0 and (not self.echo or self.min_tokens):
      raise invalid(
        'max_tokens',
        'got 0, expected at least 1, or 0 with echo and without min_tokens, to'
        ' score a prompt',
      )
    if self.return_tokens_as_token_ids and self.logprobs is None:
      raise invalid(
        'return_tokens_as_token_ids',
        'got true without logprobs, which is where tokens are returned;'
        ' expected both or neither',
      )
    if self.stream and self.echo and self.logprobs is not None:
      raise invalid(
        'stream',
        'got a stream with both echo and logprobs, expected at most one of'
        ' them; leave stream out, the scores of a prompt come at once',
      )

  def prompts(self) -> list[str | list[int]]:
    """Returns the prompts, one or several, as a list."""
    if isinstance(self.prompt, str):
      return [self.prompt]
    if self.prompt and isinstance(self.prompt[0], int):
      return [self.prompt]  # pyright: ignore[reportReturnType]
    return list(self.prompt)  # pyright: ignore[reportReturnType]

  def chosen(self) -> dict[str, Any]:
    """Returns the settings of the request; None: not chosen.

    Raises:
      SettingError: a key of logit_bias is no token id.
    """
    stop = (self.stop,) if isinstance(self.stop, str) else self.stop
    biases = self.logit_bias
    return {
      'temperature': self.temperature,
      'top_p': self.top_p,
      'top_k': self.top_k,
      'min_p': self.min_p,
      'repetition_penalty': self.repetition_penalty,
      'presence_penalty': self.presence_penalty,
      'frequency_penalty': self.frequency_penalty,
      'logit_bias': None if biases is None else settings.bias_pairs(biases),
      'seed': self.seed,
      'n': self.n,
      # A token follows at least; `completions` drops it.
      'max_tokens': 1 if self.max_tokens == 0 else self.max_tokens,
      'min_tokens': self.min_tokens,
      'stop': None if stop is None else tuple(stop),
      'stop_ids': _tuple(self.stop_token_ids),
      'ignore_eos': self.ignore_eos,
      'logprobs': self.logprobs,
    }


class TokenizeRequest(_Model):
  """The body of POST /tokenize."""

  model: str | None = None
  prompt: str | None = None  # as vLLM calls it
  content: str | None = None  # as llama.cpp does
  add_special_tokens: bool = True  # BOS, where /v1/completions puts one

  def text(self) -> str:
    """Returns the text.

    Raises:
      ApiError: none is given, or two.
    """
    if (self.prompt is None) == (self.content is None):
      raise invalid('prompt', 'got not exactly one of prompt and content')
    return self.prompt if self.prompt is not None else self.content or ''


class DetokenizeRequest(_Model):
  """The body of POST /detokenize."""

  model: str | None = None
  tokens: list[int]


def invalid(param: str, message: str) -> ApiError:
  """Returns a 400 about the value of one field."""
  return ApiError(400, f'{param}: {message}', param=param, code=None)


def from_setting(error: settings.SettingError) -> ApiError:
  """Returns a 400 about a setting, by its name in the API."""
  name = _API_NAMES.get(error.setting, error.setting)
  return invalid(name, str(error).removeprefix(f'{error.setting}: '))


def from_validation(errors: Sequence[Any]) -> ApiError:
  """Turns what pydantic found into a 400 that names the field."""
  error = errors[0]
  if error['type'] == 'json_invalid':
    message = f'body: got invalid JSON ({error["ctx"]["error"]})'
    return ApiError(400, message, param=None, code=None)
  # ('body', field, alternative of a union, index): the field is what helps.
  where = [str(part) for part in error['loc'][1:]]
  if not where:
    message = (
      'body: got no JSON object, expected one with the header'
      ' content-type: application/json'
    )
    return ApiError(400, message, param=None, code=None)
  if error['type'] == 'extra_forbidden':
    message = (
      f'{".".join(where)}: got a parameter that this server does not know,'
      ' expected those of the completions API; leave it out'
    )
    return ApiError(400, message, param=where[0], code='unsupported_parameter')
  # A union reports every alternative; all of the same field are one fault.
  wanted = dict.fromkeys(
    other['msg'] for other in errors if other['loc'][1:2] == error['loc'][1:2]
  )
  return invalid(where[0], '; or: '.join(wanted))


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
  return None if values is None else tuple(values)
