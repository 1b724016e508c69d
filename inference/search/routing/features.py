"""Features of a question: what one prefill of its prompt says.

    features_BF = of_prompts(engine, prompts)

The final hidden state of the prompt (a mean over its tokens, or the last one),
the entropy of the next token, the probability of the likeliest one, and the log
of the number of tokens. The engine answers it as a request of one given token,
and computes a prompt once: the prefix cache keeps its pages for the answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from inference import model_port
from inference.engine import engine as engine_lib
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib

# The most that a request may ask for. What lies outside counts as one token.
_NUM_LOGPROBS = settings_lib.MAX_LOGPROBS
NUM_SCALARS = 3  # behind the hidden state


def of_prompts(
  engine: engine_lib.Engine,
  prompts: Sequence[Sequence[int]],
  *,
  pooling: str = 'last',
  adapter: str = '',
) -> np.ndarray:
  """Returns the features of prompts, float64 [B, D + 3].

  Args:
    engine: of the model that will answer.
    prompts: ids of each question, as they would be answered.
    pooling: of the hidden states, mean or last.
    adapter: digest of the adapter that will answer; '' for the base.

  Raises:
    ValueError: a prompt could not be answered.
  """
  requests = [
    request(prompt, pooling=pooling, adapter=adapter) for prompt in prompts
  ]
  return np.stack(
    [of(each) for (each,) in model_port.answer_all(engine, requests)]
  )


def request(
  prompt: Sequence[int], *, pooling: str, **fields: Any
) -> requests_lib.Request:
  """Returns the request whose completion has the features of a prompt.

  Nothing is sampled: its one token is given.

  Args:
    prompt: ids of the question.
    pooling: of the hidden states, mean or last.
    **fields: of the request, such as principal and adapter.
  """
  return requests_lib.Request(
    prompt_ids=tuple(map(int, prompt)),
    settings=settings_lib.Settings(
      temperature=0.0, max_tokens=1, logprobs=_NUM_LOGPROBS
    ),
    target=0,
    pooling=pooling,
    **fields,
  )


def of(completion: requests_lib.Completion) -> np.ndarray:
  """Returns the features of a completion of `request`, float64 [D + 3]."""
  assert completion.pooled_D is not None
  assert completion.logprobs is not None
  logprobs_N = np.asarray(completion.logprobs[0].values, np.float64)
  return np.concatenate(
    [
      completion.pooled_D,
      [
        entropy(logprobs_N),
        float(np.exp(logprobs_N.max())),
        float(np.log(completion.num_prompt_tokens)),
      ],
    ]
  )


def entropy(logprobs_N: np.ndarray) -> float:
  """Returns the entropy in nats; what is not listed counts as one outcome.

  So it is a lower bound of the entropy over the whole vocabulary.
  """
  probs_N = np.exp(np.asarray(logprobs_N, np.float64))
  rest = max(0.0, 1.0 - float(probs_N.sum()))
  listed = -float(np.sum(probs_N * logprobs_N))
  return listed - (rest * float(np.log(rest)) if rest > 1e-12 else 0.0)
