"""The bodies of answers, as the OpenAPI document describes them.

The server writes plain dicts; a test compares its answers with these classes.
"""

from typing import Any, Literal

import pydantic


class _Shape(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid')


class ErrorDetail(_Shape):
  """An error, in OpenAI's shape."""

  message: str
  type: str
  param: str | None
  code: str | None


class Error(_Shape):
  """The body of every answer from 400 on, and the last event of a stream."""

  error: ErrorDetail


class Status(_Shape):
  """The state of the server."""

  status: str


class Model(_Shape):
  """A served model; `version` is its name and the digest of its weights."""

  id: str
  object: Literal['model']
  created: int
  owned_by: str
  max_model_len: int
  version: str
  digests: dict[str, str | None]
  lineage: dict[str, Any]


class ModelList(_Shape):
  """The names and versions that are served."""

  object: Literal['list']
  data: list[Model]


class Version(_Shape):
  """The version of the program, and of what it runs on."""

  version: str
  commit: str
  python: str
  jax: str
  jaxlib: str
  platform: str
  device: str
  num_devices: int
  formats: dict[str, int]


class Memory(_Shape):
  """The bytes that a version takes; `free` is of the time before."""

  weights: int
  kv_cache: int
  sampling: int
  free: int | None
  total: int


class ModelVersion(_Shape):
  """A version of a model, as an administrator sees it."""

  id: str
  object: Literal['model_version']
  name: str
  state: str  # loading, ready, draining, failed or stopped
  error: str | None
  share: float
  shadow_share: float
  num_requests: int
  context: int
  memory: Memory | None
  digests: dict[str, str | None]


class VersionList(_Shape):
  """All versions, also those that load, drain or have failed."""

  object: Literal['list']
  data: list[ModelVersion]


class Traffic(_Shape):
  """The versions that requests to a name go to."""

  name: str
  weights: dict[str, float]
  shadows: dict[str, float]
  by_principal: bool


class TrafficList(_Shape):
  """The traffic of all names."""

  object: Literal['list']
  data: list[Traffic]


class Logprobs(_Shape):
  """Log-probabilities, one entry per token."""

  tokens: list[str]
  token_logprobs: list[float | None]
  top_logprobs: list[dict[str, float] | None]
  text_offset: list[int]


class Accounting(_Shape):
  """The cost of a choice, see `inference.engine.requests.Usage`."""

  prompt_tokens: int
  prefill_tokens: int
  decode_tokens: int
  cached_tokens: int
  rejected_tokens: int
  preemptions: int
  flops: float
  kv_byte_seconds: float
  queue_seconds: float
  prefill_seconds: float
  decode_seconds: float


class ChunkChoice(_Shape):
  """The next piece of a choice; the last has what ends it."""

  index: int
  text: str
  logprobs: Logprobs | None
  finish_reason: str | None
  stop_reason: str | int | None = None
  seed: int | None = None
  accounting: Accounting | None = None
  error: str | None = None


class Choice(ChunkChoice):
  """A whole choice."""

  finish_reason: str
  seed: int  # pyright: ignore[reportGeneralTypeIssues]
  accounting: Accounting  # pyright: ignore[reportGeneralTypeIssues]


class PromptDetails(_Shape):
  """What the prompt cost less."""

  cached_tokens: int


class Usage(_Shape):
  """Tokens of a request."""

  prompt_tokens: int
  completion_tokens: int
  total_tokens: int
  prompt_tokens_details: PromptDetails


class _Head(_Shape):
  id: str
  object: Literal['text_completion']
  created: int
  model: str
  system_fingerprint: str


class Completion(_Head):
  """The answer to a completions request."""

  choices: list[Choice]
  usage: Usage


class CompletionChunk(_Head):
  """An event of a stream."""

  choices: list[ChunkChoice]
  usage: Usage | None = None


class TokenizerInfo(_Shape):
  """Strings of special tokens, null if the model has none; chat template.

  A model may have further ones, such as unk_token.
  """

  model_config = pydantic.ConfigDict(extra='allow')

  tokenizer_class: str
  vocab_size: int
  model_max_length: int
  bos_token: str | None
  eos_token: str | None
  pad_token: str | None
  chat_template: str | None


class Tokens(_Shape):
  """The token ids of a text."""

  tokens: list[int]
  count: int
  max_model_len: int


class Text(_Shape):
  """The text of token ids."""

  prompt: str
