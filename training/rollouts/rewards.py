"""Parts of a reward, for `RolloutConfig.rewards`.

    rewards=(
      RewardConfig(reward=rewards.Verified(verifier=texts.Number())),
      RewardConfig(reward=rewards.Marked(marks=('####',)), weight=0.1),
      RewardConfig(reward=rewards.Length(free=64), weight=0.01),
      RewardConfig(reward=another, weight=0.0, name='held_out'),
    )

The run computes the weighted sum, checks it and logs each part. A part of
weight 0 does not train. For example, a verifier that the policy never sees,
beside a proxy that trains it, shows whether the policy games the proxy.

A part may fail on an answer: a verifier took too long or crashed, or a judge's
words hold no verdict. The answer then gets 0, and `Rewards` counts the failure.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from absl import logging

from checks import expect, paths
from evals import endpoint, judges, ports
from evals.verifiers import verifier as verifier_lib
from training.rollouts.dialogues import episodes as episodes_lib

_Episodes = Sequence[episodes_lib.Episode]


class Rewards(list[float]):
  """One reward per episode, and the number of failures, which have 0."""

  def __init__(self, values: Sequence[float], failures: Sequence[str] = ()):
    super().__init__(values)
    self.failures = len(failures)
    if failures:
      logging.warning(
        '%d of %d answers have the reward 0 because their verifier or judge'
        ' failed; the first: %s',
        len(failures),
        len(values),
        failures[0],
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
  """The score of a verifier, from 0 to 1.

  The verifier reads the record of the prompt, as `evals/verifiers/` says.
  """

  verifier: verifier_lib.Verifier
  workers: int = 0  # answers at a time, where programs are run; 0: one per core

  @property
  def __name__(self) -> str:
    """Returns the verifier's name, the default name in metrics."""
    return type(self.verifier).__name__

  def check(self, record: verifier_lib.Record) -> None:
    """Raises ValueError for a record that the verifier cannot use."""
    self.verifier.check(record)

  def __call__(self, episodes: _Episodes) -> Rewards:
    """Returns the score of each answer."""
    scores = verifier_lib.score_all(
      self.verifier, [(each.text, each.record) for each in episodes],
      self.workers,
    )  # fmt: skip
    failed = [each.reason for each in scores if each.failure]
    return Rewards([each.value for each in scores], failed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked:
  """1 for an answer with all of these marks, each once and in this order."""

  marks: tuple[str, ...]

  def __post_init__(self):
    if not self.marks or not all(self.marks):
      raise ValueError(
        f'rewards.Marked.marks: got {self.marks!r}, expected texts'
      )

  def __call__(self, episodes: _Episodes) -> Rewards:
    """Returns 1 or 0 for each answer."""
    return Rewards([float(self._has_all(each.text)) for each in episodes])

  def _has_all(self, text: str) -> bool:
    places = [text.find(mark) for mark in self.marks]
    is_once = all(text.count(mark) == 1 for mark in self.marks)
    return is_once and places == sorted(places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
  """Minus the number of sampled tokens above `free`; its weight is the price.

  DAPO's penalty for answers close to the limit of tokens is
  `RolloutConfig.overlong_tokens`.
  """

  free: int = 0

  def __post_init__(self):
    expect.at_least('rewards.Length.free', self.free, 0)

  def __call__(self, episodes: _Episodes) -> Rewards:
    """Returns a number of at most 0 for each answer."""
    return Rewards(
      [-float(max(0, each.num_sampled - self.free)) for each in episodes]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
  """The reward of a frozen reward model.

  Training does not import inference: `bind` gives it the function.
  """

  path: str  # frozen directory of a reward model
  score: judges.ScoreFn | None = None  # set by `bind`

  def bound(
    self, open_scorer: Callable[[str], judges.ScoreFn]
  ) -> 'RewardModel':
    """Returns the reward model with a scoring function, which loads weights."""
    path = paths.expanded('rewards.RewardModel', self.path)
    return dataclasses.replace(self, score=open_scorer(path))

  def __call__(self, episodes: _Episodes) -> Rewards:
    """Returns the reward of each answer to its prompt."""
    if self.score is None:
      raise ValueError(
        f'rewards.RewardModel: got {self.path!r} without its weights, expected'
        ' a run that was started with train.py, which loads them'
      )
    found = self.score([(prompt_of(each), each.text) for each in episodes])
    return Rewards([float(each) for each in found])


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointJudge:
  """A language model behind an OpenAI-compatible API, as a judge."""

  url: str  # of the API, such as http://127.0.0.1:8000/v1
  model: str  # its name there
  max_tokens: int = 512  # most tokens of its reply
  concurrency: int = 8  # comparisons at a time

  def __call__(
    self, comparisons: Sequence[judges.Comparison]
  ) -> Sequence[judges.Verdict]:
    """Returns a verdict per comparison."""
    ask = endpoint.ask(
      self.url, self.model, ports.SampleSettings(max_tokens=self.max_tokens),
      concurrency=self.concurrency,
    )  # fmt: skip
    return judges.by_asking(ask)(comparisons)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """The share of comparisons in which a judge prefers an answer, 0 to 1.

  Each pair is asked in both orders, which count half each. So a judge that
  prefers a position gives 1/2 to all answers (Zheng et al. 2023,
  arXiv:2306.05685). Without `against`, an answer is compared with the next
  answer to the same prompt, in a ring: group_size comparisons per prompt.
  """

  judge: judges.Judge
  against: str = ''  # field of the record with the answer to beat

  def __call__(self, episodes: _Episodes) -> Rewards:
    """Returns the share of verdicts for each answer; a tie is half of one."""
    pairs = self._pairs(episodes)
    try:
      found = judges.both_orders(
        self.judge,
        [
          judges.Comparison(prompt_of(episodes[i]), episodes[i].text, other)
          for i, _, other in pairs
        ],
      )
    except Exception as error:  # a judge is often another machine
      told = f'{type(error).__name__}: {error}'
      return Rewards([0.0] * len(episodes), [told] * len(episodes))
    points: list[list[float]] = [[] for _ in episodes]
    failures = []
    for (i, j, _), orders in zip(pairs, found, strict=True):
      won = _points(orders)
      if won is None:
        failures.append('a verdict that cannot be read')
        continue
      points[i].append(won)
      if j is not None:
        points[j].append(1 - won)
    return Rewards([sum(p) / len(p) if p else 0.0 for p in points], failures)

  def _pairs(self, episodes: _Episodes) -> list[tuple[int, int | None, str]]:
    """Returns (episode, other episode or None, other answer) of each pair."""
    if self.against:
      return [
        (i, None, str(each.record.get(self.against, '')))
        for i, each in enumerate(episodes)
      ]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, each in enumerate(episodes):
      groups.setdefault(each.prompt_ids, []).append(i)
    return [
      (i, j, episodes[j].text)
      for members in groups.values()
      for i, j in zip(members, [*members[1:], members[0]], strict=True)
      if i != j
    ]


def _points(orders: judges.Orders) -> float | None:
  """Returns the share of the first answer; None if a verdict is unreadable."""
  worth = {
    judges.Choice.FIRST: 1.0, judges.Choice.TIE: 0.5, judges.Choice.SECOND: 0.0
  }  # fmt: skip
  forward, backward = (worth.get(verdict.choice) for verdict in orders)
  if forward is None or backward is None:
    return None
  return (forward + 1 - backward) / 2


def prompt_of(episode: episodes_lib.Episode) -> judges.Prompt:
  """Returns the prompt of an episode for a judge: messages, or its text."""
  if episode.messages:
    return episode.messages
  for name in ('prompt', 'question'):
    if isinstance(found := episode.record.get(name), str):
      return found
  return ''


def bind(parts: Sequence[Any], open_scorer: Callable[[str], judges.ScoreFn]):
  """Returns the parts of a RolloutConfig with the weights that they need.

  Args:
    parts: the `RewardConfig`s of a run.
    open_scorer: loads a reward model, like `inference.rewards.open_scorer`.
  """
  return tuple(
    dataclasses.replace(part, reward=part.reward.bound(open_scorer))
    if isinstance(part.reward, RewardModel)
    else part
    for part in parts
  )
