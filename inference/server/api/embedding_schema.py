"""The body of POST /v1/embeddings."""

from typing import ClassVar, Literal

import pydantic

from inference.server.api import errors, schema

MAX_INPUTS = 2048  # as at OpenAI


class EmbeddingRequest(schema.Body):
  """The body of POST /v1/embeddings; null means the default."""

  most_lists: ClassVar[int] = MAX_INPUTS + 64

  model: str
  input: schema.Prompts
  dimensions: int | None = pydantic.Field(
    default=None,
    description='The first numbers to keep of each vector; null: all.',
  )
  encoding_format: Literal['float', 'base64'] | None = pydantic.Field(
    default=None,
    description='base64: of little-endian float32 numbers; null: float.',
  )
  user: str | None = pydantic.Field(
    default=None, description="Written to the server's log."
  )
  pooling: Literal['mean', 'last'] | None = pydantic.Field(
    default=None,
    description='The hidden states that make a vector: the mean over all tokens'
    ' (null, mean), or that of the last token.',
  )

  def inputs(self) -> list[str | list[int]]:
    """Returns the inputs as a list.

    Raises:
      ApiError: status 400, there are none or too many, or one is empty.
    """
    inputs = schema.as_prompts(self.input)
    if not 1 <= len(inputs) <= MAX_INPUTS:
      raise errors.invalid(
        'input',
        f'got {len(inputs)} inputs, expected 1 to {MAX_INPUTS}; send several'
        ' requests',
      )
    if not all(inputs):
      raise errors.invalid(
        'input', 'got an empty input, expected a text or token ids'
      )
    return inputs
