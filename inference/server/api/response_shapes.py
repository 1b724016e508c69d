"""The bodies of answers of /v1/responses, as the OpenAPI document has them."""

from typing import Any, Literal

import pydantic

from inference.server.api import shapes


class _Shape(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid')


_Status = Literal['in_progress', 'completed', 'incomplete']


class TextPart(_Shape):
  """A text of the model."""

  type: Literal['output_text', 'reasoning_text']
  text: str
  annotations: list[Any] | None = None
  logprobs: list[Any] | None = None


class MessageItem(_Shape):
  """A message of the model."""

  type: Literal['message']
  id: str
  role: Literal['assistant']
  status: _Status
  content: list[TextPart]


class ReasoningItem(_Shape):
  """The reasoning before an answer or a call."""

  type: Literal['reasoning']
  id: str
  status: _Status
  summary: list[Any]
  content: list[TextPart]


class CallItem(_Shape):
  """A call of a function; its arguments are JSON."""

  type: Literal['function_call']
  id: str
  call_id: str
  name: str
  arguments: str
  status: _Status


class ResponseError(_Shape):
  """The reason why a generation failed."""

  code: Literal['server_error']
  message: str


class IncompleteDetails(_Shape):
  """The reason why a response is not complete."""

  reason: Literal['max_output_tokens']


class InputDetails(_Shape):
  """Tokens of the prompt that were found computed."""

  cached_tokens: int
  cache_write_tokens: int


class OutputDetails(_Shape):
  """Tokens of a kind."""

  reasoning_tokens: int
  accepted_prediction_tokens: int  # tokens of drafts that the response has
  rejected_prediction_tokens: int  # other tokens of drafts; not billed


class ResponseUsage(_Shape):
  """Tokens of a response."""

  input_tokens: int
  input_tokens_details: InputDetails
  output_tokens: int
  output_tokens_details: OutputDetails
  total_tokens: int
  receipt: shapes.Receipt | None = None  # if a strategy or a budget was asked


class Response(_Shape):
  """A response, and the parameters that it was made with."""

  id: str
  object: Literal['response']
  created_at: int
  completed_at: int | None
  status: Literal['in_progress', 'completed', 'incomplete', 'failed']
  background: bool
  error: ResponseError | None
  incomplete_details: IncompleteDetails | None
  instructions: str | None
  max_output_tokens: int | None
  metadata: dict[str, str]
  model: str
  output: list[MessageItem | ReasoningItem | CallItem]
  parallel_tool_calls: bool
  previous_response_id: str | None
  reasoning: dict[str, Any]
  service_tier: str
  store: bool
  temperature: float
  text: dict[str, Any]
  tool_choice: str | dict[str, Any]
  tools: list[dict[str, Any]]
  top_logprobs: int
  top_p: float
  truncation: str
  usage: ResponseUsage | None
  user: str | None
  system_fingerprint: str


class ResponseEvent(_Shape):
  """An event of a stream, of one of OpenAI's types."""

  model_config = pydantic.ConfigDict(extra='allow')

  type: str
  sequence_number: int


class DeletedResponse(_Shape):
  """A response that was deleted."""

  id: str
  object: Literal['response']
  deleted: Literal[True]


class ItemList(_Shape):
  """A page of input items."""

  object: Literal['list']
  data: list[dict[str, Any]]
  first_id: str
  last_id: str
  has_more: bool
