"""Embeddings: one unit vector per input, of the served model's hidden states.

The final hidden states of the input's tokens, which the model would turn into
logits, are pooled and then scaled to length 1, so that a scalar product is a
cosine. With fewer `dimensions` the first ones are kept and scaled again, as
OpenAI does. A model that was not trained for that loses more accuracy.

The inputs are sequences of the engine's running batch, as prompts are. They
have their principal's share of the batch, and neither chunks nor other
requests change a vector. No token is sampled after them.
"""

import base64
from collections.abc import Awaitable, Callable, Sequence
import contextlib
import logging
from typing import Any

import numpy as np

from checks import expect
from inference import generate
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.server import engine_loop
from inference.server.api import embedding_schema, errors

_LOG = logging.getLogger('uvicorn.error')
# Inputs that wait in the engine at once; the others wait here.
_MOST_TOGETHER = 64
# Numbers of an answer, by format: 20 bytes each as text, 5.3 in base64.
_MOST_NUMBERS = {'float': 2**21, 'base64': 2**23}
# The engine needs a token after a prompt. It takes this id without sampling.
_UNREAD = settings_lib.Settings(temperature=0.0, max_tokens=1)

Submit = Callable[
  [Sequence[requests_lib.Request]], Awaitable[engine_loop.Updates]
]


class Answer:
  """The answer to one request."""

  def __init__(
    self,
    generator: generate.Generator,
    body: embedding_schema.EmbeddingRequest,
    *,
    principal: str,
  ):
    """Checks the inputs.

    Raises:
      ApiError: status 400; `param` names the field.
    """
    self._body, self._format = body, body.encoding_format or 'float'
    inputs = body.inputs()
    width = generator.frozen.config.model_width
    self._dimensions = width if body.dimensions is None else body.dimensions
    if not 1 <= self._dimensions <= width:
      raise errors.invalid(
        'dimensions',
        f'got {body.dimensions}, expected 1 to {width}, the width of this'
        ' model',
      )
    self.size = len(inputs) * self._dimensions  # numbers of the answer
    if self.size > (most := _MOST_NUMBERS[self._format]):
      raise errors.invalid(
        'input',
        f'got {len(inputs)} inputs of {self._dimensions} dimensions, expected'
        f' at most {most} numbers as {self._format}; send several requests',
      )
    self._requests = [
      _request(generator, each, principal, body.pooling or 'mean')
      for each in inputs
    ]
    self._vectors: list[np.ndarray | None] = [None] * len(inputs)

  async def finish(self, submit: Submit) -> None:
    """Computes the vectors.

    Raises:
      ApiError: status 500, the model's numbers are not finite; or as `submit`.
    """
    for start in range(0, len(self._requests), _MOST_TOGETHER):
      some = self._requests[start : start + _MOST_TOGETHER]
      updates = await submit(some)
      with contextlib.closing(updates):
        async for which, update in updates:
          if update.completion:
            self._vectors[start + which] = self._vector(update.completion)
    _LOG.info(
      'embeddings principal=%s user=%s inputs=%d tokens=%d',
      expect.shown(self._requests[0].principal),
      expect.shown(self._body.user),
      len(self._requests),
      self._num_tokens,
    )

  def whole(self) -> dict[str, Any]:
    """Returns the body of an answer that is finished."""
    num_tokens = self._num_tokens
    return {
      'object': 'list',
      'data': [
        {
          'object': 'embedding',
          'index': index,
          'embedding': self._written(each),
        }
        for index, each in enumerate(self._vectors)
      ],
      'model': self._body.model,
      'usage': {'prompt_tokens': num_tokens, 'total_tokens': num_tokens},
    }

  @property
  def _num_tokens(self) -> int:
    return sum(len(each.prompt_ids) for each in self._requests)

  def _vector(self, completion: requests_lib.Completion) -> np.ndarray:
    pooled_D = completion.pooled_D
    if completion.finish_reason == 'error' or pooled_D is None:
      raise errors.ApiError(
        500,
        'the model computed numbers that are not finite; see the server log',
        param=None,
        code=None,
      )
    kept_D = pooled_D[: self._dimensions]
    norm = np.linalg.norm(kept_D)
    return (kept_D / (norm or 1.0)).astype('<f4')

  def _written(self, vector_D: np.ndarray | None) -> list[float] | str:
    assert vector_D is not None
    if self._format == 'base64':
      return base64.b64encode(vector_D.tobytes()).decode()
    return vector_D.tolist()


def _request(
  generator: generate.Generator,
  text: generate.Prompt,
  principal: str,
  pooling: str,
) -> requests_lib.Request:
  try:
    generator.check_length(text)
    ids = generator.prompt_ids(text)
    context = generator.engine.context
    if len(ids) > context:
      raise requests_lib.TooLong(
        f'got {len(ids)} tokens, expected at most {context}, the context of'
        ' this model; split the input'
      )
    return generator.request(
      ids, _UNREAD, principal=principal, target=0, pooling=pooling
    )
  except ValueError as error:
    raise errors.refused_prompt(error, 'input') from error
