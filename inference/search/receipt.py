"""The receipt of a search: what its answer has cost, and what else it might.

It is not the receipt of a replay (`inference.server.receipts`), which says how
an answer was made.
"""

from collections.abc import Sequence
import dataclasses

from inference.requests import requests as requests_lib
from inference.search import budget as budget_lib, samples as samples_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
  """What one answer has cost; FLOPs and seconds are those of the engine."""

  prompt_tokens: int  # of the question, once
  reasoning_tokens: int  # sampled, of the chosen answer
  answer_tokens: int  # sampled, of the chosen answer, without its reasoning
  discarded_tokens: int  # sampled, of everything that was not chosen
  forced_tokens: int  # of the chosen answer, put in and not sampled
  scored_tokens: int  # read by a model that scores answers
  num_samples: int  # parts that were sampled
  prefill_tokens: int  # computed in chunks, also after a preemption
  cached_tokens: int  # of prompts, that were computed before
  decode_tokens: int  # computed one at a time
  flops: float  # of samples and scores
  score_flops: float  # part of these
  kv_byte_seconds: float
  seconds: float  # wall time, from the first request to the end
  money: float
  # Of one sample that says the answer at once: the prompt and the answer's
  # tokens, no reasoning, nothing discarded, nothing cached.
  single_flops: float
  single_money: float

  @property
  def completion_tokens(self) -> int:
    """All sampled tokens, which a budget of tokens limits."""
    return self.reasoning_tokens + self.answer_tokens + self.discarded_tokens

  @property
  def cost(self) -> budget_lib.Cost:
    """What the budget has paid."""
    return budget_lib.Cost(
      tokens=self.completion_tokens, flops=self.flops, money=self.money
    )


def made(
  chosen: samples_lib.Sample | None,
  completions: Sequence[requests_lib.Completion],
  *,
  unsampled: Sequence[requests_lib.Completion] = (),
  num_prompt: int,
  total: budget_lib.Cost,
  scores: budget_lib.Cost,
  scored_tokens: int,
  costs: budget_lib.Costs,
  seconds: float,
) -> Receipt:
  """Returns the receipt of a search that has ended.

  Args:
    chosen: its answer, None if there is none.
    completions: all parts, also cancelled ones.
    unsampled: of requests in which nothing was sampled, as of scores.
    num_prompt: tokens of the question.
    total: what parts and scores have cost.
    scores: what all scores have cost.
    scored_tokens: that they have read.
    costs: of the model.
    seconds: that the search took.
  """
  num_kept = chosen.num_sampled if chosen else 0
  num_reasoning = chosen.num_reasoning if chosen else 0
  used = [each.usage for each in (*unsampled, *completions)]
  num_answer = num_kept - num_reasoning
  single = costs.most(num_prompt, max(num_answer, 1))
  return Receipt(
    prompt_tokens=num_prompt,
    reasoning_tokens=num_reasoning,
    answer_tokens=num_answer,
    discarded_tokens=sum(x.num_completion_tokens for x in completions)
    - num_kept,
    forced_tokens=len(chosen.forced) if chosen else 0,
    scored_tokens=scored_tokens,
    num_samples=len(completions),
    prefill_tokens=sum(each.prefill_tokens for each in used),
    cached_tokens=sum(each.cached_tokens for each in used),
    decode_tokens=sum(each.decode_tokens for each in used),
    flops=total.flops,
    score_flops=scores.flops,
    kv_byte_seconds=sum(each.kv_byte_seconds for each in used),
    seconds=seconds,
    money=total.money,
    single_flops=single.flops,
    single_money=costs.prices.money(
      prompt=num_prompt, cached=0, completion=num_answer
    ),
  )
