"""A language model without a network: every answer can be worked out by hand.

The distribution of the next token is a fixed random row of a table, chosen by
the last three tokens that were read. What is beyond the context, or cut away,
therefore shows.
"""

import numpy as np

from evals import ports
from tests.helpers import tiny_models

_READ = 3  # tokens that a prediction depends on


class TableModel:
  """Scores and samples by a table, and records its requests."""

  def __init__(self, vocab_size: int, *, seed: int = 0):
    self.vocab_size = vocab_size
    self.seed = seed
    self.requests: list = []

  def logprobs_V(self, ids) -> np.ndarray:
    """Returns the next token's log-probabilities."""
    rng = np.random.default_rng([self.seed, *ids[-_READ:]])
    logits_V = 2 * rng.standard_normal(self.vocab_size)
    return logits_V - np.log(np.sum(np.exp(logits_V)))

  def score(self, requests):
    """Returns log-probabilities, as a LogprobFn does."""
    self.requests += list(requests)
    answers = []
    for context, continuation in requests:
      assert context
      assert continuation
      ids, token_logprobs, is_greedy = list(context), [], True
      for token in continuation:
        logprobs_V = self.logprobs_V(ids)
        token_logprobs.append(logprobs_V[token])
        is_greedy &= int(np.argmax(logprobs_V)) == token
        ids.append(token)
      token_logprobs = np.array(token_logprobs)
      answers.append(
        ports.Logprobs(float(np.sum(token_logprobs)), is_greedy, token_logprobs)
      )
    return answers


def model(**fields) -> ports.Model:
  """Returns a byte model that scores by a table and reads 32 tokens."""
  tokenizer = tiny_models.byte_tokenizer()
  table = TableModel(tokenizer.vocab_size)
  return ports.Model(
    **{
      'tokenizer': tokenizer,
      'max_length': 32,
      'logprob_fn': table.score,
      **fields,
    }
  )


def writer(answers, *, seen=None):
  """Returns a SampleFn that writes `answers`, a list per prompt, in order."""
  waiting = [list(samples) for samples in answers]

  def sample(prompts, settings, num_samples):
    if seen is not None:
      seen.append((prompts, settings, num_samples))
    return [
      [ports.Completion(text, ()) for text in waiting.pop(0)[:num_samples]]
      for _ in prompts
    ]

  return sample
