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
  # Of an adapter: name and version of its base.
  root: str | None = None
  parent: str | None = None


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
  adapters: int
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
  base: str | None  # of an adapter: the version whose engine computes it


class VersionList(_Shape):
  """All versions, in any state: loading, draining and failed ones, too."""

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


class Parameter(_Shape):
  """A parameter of a route; `accepted` if it is not supported."""

  name: str
  in_: Literal['body', 'header', 'path', 'query'] = pydantic.Field(alias='in')
  supported: bool
  required: bool
  description: str
  values: dict[str, Any] | None = None
  accepted: list[Any] | None = None


class Route(_Shape):
  """A route and its parameters."""

  method: str
  path: str
  answers: list[str]
  parameters: list[Parameter]


class Capabilities(_Shape):
  """The parameters of every route."""

  object: Literal['capabilities']
  note: str
  routes: list[Route]


class Logprobs(_Shape):
  """Log-probabilities, one entry per token."""

  tokens: list[str]
  token_logprobs: list[float | None]
  top_logprobs: list[dict[str, float] | None]
  text_offset: list[int]


class Accounting(_Shape):
  """The cost of a choice, see `inference.requests.requests.Usage`."""

  prompt_tokens: int
  prefill_tokens: int
  decode_tokens: int
  cached_tokens: int
  accepted_tokens: int
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


class TopLogprob(_Shape):
  """The log-probability of a token; special tokens have no bytes."""

  token: str
  logprob: float
  bytes: list[int]


class TokenLogprob(TopLogprob):
  """That of a token of the text, with the most probable ones."""

  top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
  """Log-probabilities, one entry per token of the text."""

  content: list[TokenLogprob]
  refusal: None


class CalledFunction(_Shape):
  """The function of a call; its arguments are JSON."""

  name: str
  arguments: str


class ToolCall(_Shape):
  """A call of a tool."""

  id: str
  type: Literal['function']
  function: CalledFunction


class ChatMessage(_Shape):
  """An answer; content is null if it only calls tools."""

  role: Literal['assistant']
  content: str | None
  refusal: None
  reasoning_content: str | None = None
  tool_calls: list[ToolCall] | None = None


class _ChatEnding(_Shape):
  index: int
  logprobs: ChatLogprobs | None
  finish_reason: str | None
  stop_reason: str | int | None = None
  seed: int | None = None
  accounting: Accounting | None = None
  error: str | None = None


class ChatChoice(_ChatEnding):
  """A whole choice."""

  message: ChatMessage


class FunctionPiece(_Shape):
  """The next piece of the function of a call."""

  name: str | None = None
  arguments: str


class ToolCallPiece(_Shape):
  """The next piece of a call; the first has its id and name."""

  index: int
  id: str | None = None
  type: Literal['function'] | None = None
  function: FunctionPiece


class Delta(_Shape):
  """The next piece of an answer: one of these, or nothing at its end."""

  role: Literal['assistant'] | None = None
  content: str | None = None
  reasoning_content: str | None = None
  tool_calls: list[ToolCallPiece] | None = None


class ChatChunkChoice(_ChatEnding):
  """The next piece of a choice; the last has what ends it."""

  delta: Delta


class PromptDetails(_Shape):
  """What the prompt cost less."""

  cached_tokens: int


class Usage(_Shape):
  """Tokens of a request."""

  prompt_tokens: int
  completion_tokens: int
  total_tokens: int
  prompt_tokens_details: PromptDetails


class CompletionDetails(_Shape):
  """Tokens of a kind."""

  reasoning_tokens: int
  accepted_prediction_tokens: int  # tokens of drafts that the answer has
  rejected_prediction_tokens: int  # other tokens of drafts; not billed


class Receipt(_Shape):
  """What an answer of a strategy has cost, see `inference.search.receipt`."""

  prompt_tokens: int
  reasoning_tokens: int
  answer_tokens: int
  discarded_tokens: int
  forced_tokens: int
  scored_tokens: int
  num_samples: int
  prefill_tokens: int
  cached_tokens: int
  decode_tokens: int
  flops: float
  score_flops: float
  kv_byte_seconds: float
  seconds: float
  money: float
  single_flops: float
  single_money: float
  ended_by: Literal['done', 'decided', 'budget']
  # Of the effort auto: the chosen effort, and P(correct) of each.
  effort: str | None = None
  probabilities: dict[str, float] | None = None


class ChatUsage(Usage):
  """Tokens of a chat request."""

  completion_tokens_details: CompletionDetails
  receipt: Receipt | None = None  # if a strategy or a budget was asked for


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


class Chat(_Head):
  """The answer to a chat request."""

  object: Literal['chat.completion']  # pyright: ignore
  choices: list[ChatChoice]
  usage: ChatUsage


class ChatChunk(_Head):
  """An event of a stream of a chat."""

  object: Literal['chat.completion.chunk']  # pyright: ignore
  choices: list[ChatChunkChoice]
  usage: ChatUsage | None = None


class CompletionChunk(_Head):
  """An event of a stream."""

  choices: list[ChunkChoice]
  usage: Usage | None = None


class Embedding(_Shape):
  """The vector of an input: numbers, or base64 of float32 numbers."""

  object: Literal['embedding']
  index: int
  embedding: list[float] | str


class EmbeddingUsage(_Shape):
  """Tokens of all inputs."""

  prompt_tokens: int
  total_tokens: int


class EmbeddingList(_Shape):
  """The vectors, in the order of the inputs."""

  object: Literal['list']
  data: list[Embedding]
  model: str
  usage: EmbeddingUsage


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


class Prices(_Shape):
  """Money for so many tokens, in the currency of the operator."""

  object: Literal['prices']
  per_tokens: int
  prompt: float
  cached: float
  completion: float


class Feedback(_Shape):
  """Feedback that is stored."""

  id: str
  object: Literal['feedback']
  created: int


class DeletedFeedback(_Shape):
  """The number of rows that were deleted."""

  object: Literal['feedback.deleted']
  deleted: int


class Tokens(_Shape):
  """The token ids of a text."""

  tokens: list[int]
  count: int
  max_model_len: int


class Text(_Shape):
  """The text of token ids."""

  prompt: str
