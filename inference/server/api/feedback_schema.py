"""The body of POST /v1/feedback, and its limits."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic

from inference.server.api import errors, schema

MOST_MESSAGES = 1000
MOST_TEXT = 256 * 1024  # characters of all messages, and of an answer
MOST_COMMENT = 2000  # characters
_MOST_ID = 200

_Id = Annotated[str, pydantic.Field(min_length=1, max_length=_MOST_ID)]


class FeedbackMessage(schema.Body):
  """A message of the conversation, as in chat completions."""

  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | None = None
  name: str | None = None
  tool_calls: list[dict[str, Any]] | None = None
  tool_call_id: str | None = None


class FeedbackRequest(schema.Body):
  """The body of POST /v1/feedback: a rating, and what it is about.

  The server keeps no prompts and outputs, so the client sends along what may be
  stored.
  """

  most_lists: ClassVar[int] = 2 * MOST_MESSAGES + 64

  request_id: _Id = pydantic.Field(
    description='The header x-request-id of the answer.'
  )
  model: _Id = pydantic.Field(description='The model that answered.')
  messages: Annotated[
    list[FeedbackMessage],
    pydantic.Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
  ] = pydantic.Field(description='The conversation up to the answer.')
  answer: str = pydantic.Field(
    max_length=MOST_TEXT, description='The text of the answer.'
  )
  thumb: Literal['up', 'down'] | None = None
  preferred: str | None = pydantic.Field(
    default=None,
    min_length=1,
    max_length=MOST_TEXT,
    description='An answer that would have been better.',
  )
  comment: str | None = pydantic.Field(default=None, max_length=MOST_COMMENT)

  def check(self) -> None:
    """Refuses a body that says nothing, or too much.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    if self.thumb is None and self.preferred is None:
      raise errors.invalid(
        'thumb', 'got neither thumb nor preferred, expected at least one'
      )
    num = len(self.model_dump_json(include={'messages'}, exclude_none=True))
    if num > MOST_TEXT:
      raise errors.invalid(
        'messages',
        f'got {num} characters of JSON, expected at most {MOST_TEXT}; send the'
        ' last messages only',
      )

  def row(self) -> dict[str, Any]:
    """Returns the columns of the records."""
    return self.model_dump(exclude={'messages'}) | {
      'messages': [each.model_dump(exclude_none=True) for each in self.messages]
    }
