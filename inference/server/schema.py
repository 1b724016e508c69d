"""What POST /v1/completions accepts, and how it refuses.

Every field that clients of OpenAI's API send is here: implemented, or refused
unless it holds the value that changes nothing. A field that is not here is
refused too. Nothing is ignored.
"""

from collections.abc import Sequence
from typing import Any

import pydantic

MAX_SEQUENCES = 64  # prompts times n: they are decoded as one batch

# Fields that are refused unless absent, null, or one of these.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  'best_of': (1,),
  'frequency_penalty': (0,),
  'ignore_eos': (False,),
  'logit_bias': ({},),
  'logprobs': (),  # 0 asks for the chosen token's
  'min_tokens': (0,),
  'presence_penalty': (0,),
  'repetition_penalty': (1,),
  'suffix': (),
}


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
    is_ours = self.status >= 500
    return {
      'error': {
        'message': str(self),
        'type': 'server_error' if is_ours else 'invalid_request_error',
        'param': self.param,
        'code': self.code,
      }
    }


class _Model(pydantic.BaseModel):
  # Strict: '0.5' is not a number and true is not 1.
  model_config = pydantic.ConfigDict(extra='forbid', strict=True)


class StreamOptions(_Model):
  """How a stream is sent."""

  include_usage: bool = False


class CompletionRequest(_Model):
  """The body of POST /v1/completions; null means the default."""

  model: str
  prompt: str | list[str] | list[int] | list[list[int]]
  max_tokens: int | None = None  # None: the model's recommendation
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None  # not OpenAI's, as vLLM has it
  min_p: float | None = None  # not OpenAI's, as vLLM has it
  seed: int | None = None
  stop: str | list[str] | None = None
  n: int | None = None
  echo: bool | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None  # goes to the server's log, as it is meant to

  best_of: Any = None
  frequency_penalty: Any = None
  ignore_eos: Any = None
  logit_bias: Any = None
  logprobs: Any = None
  min_tokens: Any = None
  presence_penalty: Any = None
  repetition_penalty: Any = None
  suffix: Any = None

  def check(self) -> None:
    """Refuses what the types allow and this server does not do.

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
        'stream_options',
        'stream_options: got options without stream, expected stream: true',
      )
    if self.n is not None and self.n < 1:
      raise invalid('n', f'n: got {self.n}, expected at least 1')
    num_sequences = len(self.prompts()) * (self.n or 1)
    if not 1 <= num_sequences <= MAX_SEQUENCES:
      raise invalid(
        'prompt',
        f'prompt: got {num_sequences} completions to make (prompts times n),'
        f' expected 1 to {MAX_SEQUENCES}; send several requests',
      )

  def prompts(self) -> list[str | list[int]]:
    """Returns the prompts, one or several, as a list."""
    if isinstance(self.prompt, str):
      return [self.prompt]
    if self.prompt and isinstance(self.prompt[0], int):
      return [self.prompt]  # pyright: ignore[reportReturnType]
    return list(self.prompt)  # pyright: ignore[reportReturnType]

  def chosen(self) -> dict[str, Any]:
    """Returns the sampling settings of the request; None: not chosen."""
    stop = (self.stop,) if isinstance(self.stop, str) else self.stop
    return {
      'temperature': self.temperature,
      'top_p': self.top_p,
      'top_k': self.top_k,
      'min_p': self.min_p,
      'seed': self.seed,
      'max_tokens': self.max_tokens,
      'stop': None if stop is None else tuple(stop),
    }


def invalid(param: str, message: str) -> ApiError:
  """Returns a 400 about the value of one field."""
  return ApiError(400, message, param=param, code=None)


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
  return invalid(where[0], f'{where[0]}: {"; or: ".join(wanted)}')
