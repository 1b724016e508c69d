"""The ports of evaluations, made of `model.apply` in the plainest way.

One request at a time, padded to the length that the model reads, and no cache:
what the engine's and the run's own are held against.
"""

import jax
import jax.numpy as jnp
import numpy as np

from evals import ports


class Network:
  """Scores and samples with `model.apply`."""

  def __init__(self, apply, params, tokenizer, max_length: int):
    self._tokenizer = tokenizer
    self._length = max_length
    self._apply = jax.jit(lambda tokens_BT: apply(params, tokens_BT)[0])

  def _logprobs_TV(self, ids) -> np.ndarray:
    tokens_1T = np.zeros((1, self._length), np.int32)
    tokens_1T[0, : len(ids)] = ids
    logits_TV = self._apply(jnp.asarray(tokens_1T))[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))

  def score(self, requests):
    """Returns log-probabilities, as a LogprobFn does."""
    answers = []
    for context, continuation in requests:
      read = [*context, *continuation][:-1]
      logprobs_TV = self._logprobs_TV(read)[len(context) - 1 :]
      token_logprobs = np.take_along_axis(
        logprobs_TV, np.array(continuation)[:, None], axis=1
      )[:, 0].astype(np.float64)
      is_greedy = np.array_equal(np.argmax(logprobs_TV, 1), continuation)
      answers.append(
        ports.Logprobs(float(np.sum(token_logprobs)), is_greedy, token_logprobs)
      )
    return answers

  def sample(self, prompts, settings, num_samples):
    """Returns completions, as a SampleFn does; greedy settings only."""
    assert settings.temperature == 0
    return [
      [self._complete(list(ids), settings)] * num_samples for ids in prompts
    ]

  def _complete(self, ids, settings) -> ports.Completion:
    written = []
    while len(written) < settings.max_tokens:
      token = int(np.argmax(self._logprobs_TV(ids + written)[-1]))
      if token == self._tokenizer.eos_id:
        break
      written.append(token)
      text = self._tokenizer.decode(written)
      places = [text.find(stop) for stop in settings.stop if stop in text]
      if places:
        return ports.Completion(text[: min(places)], tuple(written))
    return ports.Completion(self._tokenizer.decode(written), tuple(written))
