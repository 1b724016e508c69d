"""Scorers: a verifier, a reward model, or the model's own probabilities."""

from collections.abc import Callable
import dataclasses

from evals import judges
from evals.verifiers import verifier as verifier_lib
from inference.search import budget as budget_lib, samples as samples_lib


@dataclasses.dataclass(frozen=True)
class _Free:
  """A scorer that no model computes."""

  @property
  def needs_logprobs(self) -> bool:
    """See `Scorer`."""
    return False

  def cost(self, num_tokens: int) -> budget_lib.Cost:
    """See `Scorer`."""
    return budget_lib.Cost()

  def num_read(self, num_tokens: int) -> int:
    """See `Scorer`."""
    return 0


@dataclasses.dataclass(frozen=True)
class MeanLogprob(_Free):
  """The mean log-probability of the sampled tokens, by the model itself.

  Not the sum, which prefers short answers.
  """

  @property
  def needs_logprobs(self) -> bool:
    """See `Scorer`."""
    return True

  def __call__(
    self, question: samples_lib.Question, sample: samples_lib.Sample
  ) -> float:
    """Returns nats per token; a large negative number without tokens."""
    return max(sample.mean_logprob, -1e9)


@dataclasses.dataclass(frozen=True)
class Verified(_Free):
  """The score of a verifier, which reads the record of the question."""

  verifier: verifier_lib.Verifier

  def __call__(
    self, question: samples_lib.Question, sample: samples_lib.Sample
  ) -> float:
    """Returns the score, 0 to 1; 0 where the verifier fails."""
    found = verifier_lib.guarded(self.verifier, sample.answer, question.record)
    return found.value


@dataclasses.dataclass(frozen=True)
class Rewarded:
  """The reward of a reward model, which costs a pass over prompt and answer.

  `link` maps rewards, as a sigmoid does for weights of votes.
  """

  score: judges.ScoreFn  # of (prompt, answer)
  costs: budget_lib.Costs  # of the reward model
  link: Callable[[float], float] = float

  @property
  def needs_logprobs(self) -> bool:
    """See `Scorer`."""
    return False

  def __call__(
    self, question: samples_lib.Question, sample: samples_lib.Sample
  ) -> float:
    """Returns the reward."""
    (found,) = self.score([(question.prompt, sample.answer)])
    return self.link(float(found))

  def cost(self, num_tokens: int) -> budget_lib.Cost:
    """Returns the cost of a prompt of so many tokens, without an answer."""
    return budget_lib.Cost(
      flops=self.costs.flops(0, num_tokens, 0),
      money=self.costs.prices.money(prompt=num_tokens, cached=0, completion=0),
    )

  def num_read(self, num_tokens: int) -> int:
    """See `Scorer`."""
    return num_tokens


@dataclasses.dataclass(frozen=True)
class Called(_Free):
  """The score of a function of the question and the text of an answer."""

  function: Callable[[samples_lib.Question, str], float]

  def __call__(
    self, question: samples_lib.Question, sample: samples_lib.Sample
  ) -> float:
    """Returns the number of the function."""
    return self.function(question, sample.answer)
