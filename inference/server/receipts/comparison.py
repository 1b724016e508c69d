"""The comparison of a receipt with the cache-free forward of the same weights.

The cache-free forward gives the logits before each token of the answer. They
give the log-probability of the recorded token, and with the settings and the
seed of the receipt the token that the sampler takes there. So each token is
judged by itself: a difference does not hide the differences after it.

There are three verdicts. EQUAL: every token and every bit are equal. ROUNDING:
the order of sums explains the differences. INFERENCE: it does not.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference import full_forward
from inference.constraints import grammars
from inference.sampling import logprobs as logprobs_lib, penalties, sampler
from inference.server.receipts import receipts
from text import tokenizer as tokenizer_lib

EQUAL, ROUNDING, INFERENCE = 'equal', 'rounding', 'inference'


class Token(NamedTuple):
  """One token of an answer, recorded and computed again."""

  place: int  # among the new tokens
  recorded: int  # id
  replayed: int  # id that the sampler takes
  recorded_logprob: float  # of the recorded token
  replayed_logprob: float
  # Whether the sampler takes the recorded token if its logit is raised by the
  # largest error that rounding may cause in the difference of two logits.
  is_near: bool

  @property
  def difference(self) -> float:
    """Absolute difference of the log-probabilities, in nats."""
    difference = abs(self.recorded_logprob - self.replayed_logprob)
    return difference if difference == difference else float('inf')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """All tokens of an answer, and the tolerance of their log-probabilities."""

  tokens: list[Token]
  tolerance: float  # nats

  @property
  def verdict(self) -> str:
    """EQUAL, ROUNDING or INFERENCE."""
    if self.first_wrong is not None:
      return INFERENCE
    return EQUAL if self.first_different is None else ROUNDING

  @property
  def first_different(self) -> Token | None:
    """The first token with any different bit."""
    return next(
      (
        each
        for each in self.tokens
        if each.difference or each.recorded != each.replayed
      ),
      None,
    )

  @property
  def first_wrong(self) -> Token | None:
    """The first token that differs by more than rounding explains."""
    return next((each for each in self.tokens if self.is_wrong(each)), None)

  @property
  def largest(self) -> Token:
    """The token whose log-probability differs most."""
    return max(self.tokens, key=lambda each: each.difference)

  def is_wrong(self, token: Token) -> bool:
    """Returns whether a token differs by more than rounding explains."""
    return token.difference > self.tolerance or not token.is_near


def compare(
  receipt: receipts.Receipt,
  forward: full_forward.FullForward,
  tokenizer: tokenizer_lib.Tokenizer,
  tolerance: float,
) -> Comparison:
  """Returns the comparison of a receipt.

  Args:
    receipt: receipt of an answer with at least one token.
    forward: cache-free forward of the weights of the receipt.
    tokenizer: tokenizer of the model.
    tolerance: tolerance of a log-probability, in nats.
  """
  num_prompt = len(receipt.prompt_ids)
  ids = receipt.prompt_ids + receipt.token_ids
  row = sampler.row(
    receipt.settings,
    num_prompt_tokens=num_prompt,
    seed=receipt.seed,
    eos_id=tokenizer.eos_id,
  )
  settings = sampler.stack([row])
  vocab_size = tokenizer.vocab_size
  seen_1V = penalties.recount(
    jnp.asarray(receipt.prompt_ids, jnp.int32),
    jnp.int32(num_prompt),
    vocab_size,
  )[None]
  matcher = _matcher(receipt, tokenizer)
  tokens = []
  for start, logits_RV in forward.logits(ids, num_prompt):
    for row_index, token in enumerate(ids[start : start + len(logits_RV)]):
      position = start + row_index
      seen_1V, found = _next(
        logits_RV[row_index][None], settings, seen_1V, token, position,
        tolerance, _allowed_1W(matcher, vocab_size),
      )  # fmt: skip
      if matcher:
        matcher.push(token)
      logprob, taken, nearly_taken = jax.device_get(found)
      place = position - num_prompt
      is_given = receipt.target is not None and not place
      tokens.append(
        Token(
          place,
          token,
          token if is_given else int(taken),
          receipt.logprobs[place],
          float(np.float32(logprob)),
          is_given or token in (taken, nearly_taken),
        )
      )
  return Comparison(tokens=tokens, tolerance=tolerance)


def _matcher(
  receipt: receipts.Receipt, tokenizer: tokenizer_lib.Tokenizer
) -> grammars.Matcher | None:
  """Returns the state of the grammar of an answer, if it had one."""
  constraint = receipt.settings.constraint
  if constraint is None:
    return None
  grammar = grammars.Grammars(tokenizer).compile(constraint)
  return grammar.matcher(receipt.settings.stop_ids)


def _allowed_1W(
  matcher: grammars.Matcher | None, vocab_size: int
) -> np.ndarray | None:
  """Returns the bits of the tokens that may come next; None: all may."""
  if matcher is None:
    return None
  bits_1W = np.full((1, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
  matcher.fill(bits_1W[0])
  return bits_1W


@functools.partial(jax.jit, donate_argnames=('seen_1V',))
def _next(logits_1V, settings, seen_1V, token, position, tolerance, allowed_1W):
  """Returns the counts with a token, and the comparison at its position."""
  tokens_1 = jnp.full((1,), token, jnp.int32)
  positions_1 = jnp.full((1,), position, jnp.int32)
  found = logprobs_lib.logprobs(logits_1V, tokens_1, jnp.zeros_like(tokens_1))

  def sampled(logits_1V):
    return sampler.sample(
      logits_1V, settings, seen_1V, positions_1, allowed_BW=allowed_1W
    )[0]

  # Both logits of a difference may be off.
  raised_1V = logits_1V.at[0, token].add(2 * tolerance)
  results = found.chosen_B[0], sampled(logits_1V), sampled(raised_1V)
  seen_1V = penalties.count(seen_1V, jnp.zeros((1,), jnp.int32), tokens_1)
  return seen_1V, results
