"""The bodies of POST /tokenize and POST /detokenize."""

from inference.server.api import errors, schema


class TokenizeRequest(schema.Body):
  """The body of POST /tokenize."""

  model: str | None = None
  prompt: str | None = None  # vLLM's name of the text
  content: str | None = None  # llama.cpp's name of the text
  add_special_tokens: bool = True  # adds BOS if /v1/completions adds it

  def text(self) -> str:
    """Returns the text.

    Raises:
      ApiError: no text is given, or two.
    """
    if (self.prompt is None) == (self.content is None):
      got = 'neither' if self.prompt is None else 'both'
      raise errors.invalid('prompt', f'got {got}, expected prompt or content')
    return self.prompt if self.prompt is not None else self.content or ''


class DetokenizeRequest(schema.Body):
  """The body of POST /detokenize."""

  model: str | None = None
  tokens: schema.Ids
