"""Search over steps: beams that a scorer chooses, with lookahead, or apart.

A step is text up to `step_end`. In each round every kept beam is continued
`width` times, the scorer reads what was said so far, and the best are kept. The
scorer is a process reward model or a verifier of steps. With lookahead it reads
a greedy continuation of some steps instead, which is thrown away: so an outcome
verifier can judge a step (Snell et al.).

Beams that are apart (DVTS) keep the best continuation of each beam alone, so
that they stay different.

A continuation is a request whose prompt ends with the beam. It shares all whole
pages of the beam through the prefix cache, and the `width` continuations share
the rest by copy-on-write. So a fork computes again less than a page, once.

References: Snell et al. 2024 (arXiv:2408.03314), section 5.2; Beeching et al.
2024, "Scaling test-time compute with open models" (DVTS).
"""

from collections.abc import Generator, Sequence
import dataclasses

from checks import expect
from inference.search import samples as samples_lib, strategy as strategy_lib
from inference.search.strategies import sampling

_Collected = Generator[
  None, samples_lib.Sample | None, list[samples_lib.Sample]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
  """Keeps `beams` of `beams` * `width` continuations, step by step.

  Raises:
    ValueError: a number is out of range, or a step has no end.
  """

  beams: int
  width: int
  scorer: samples_lib.Scorer
  step_end: str = '\n'
  most_steps: int = 40
  most_step_tokens: int | None = None  # None: the question's max_tokens
  lookahead: int = 0  # steps
  is_apart: bool = False  # DVTS

  def __post_init__(self):
    for name in ('beams', 'width', 'most_steps'):
      expect.at_least(name, getattr(self, name), 1)
    expect.at_least('lookahead', self.lookahead, 0)
    if not self.step_end:
      raise ValueError(
        "step_end: got an empty text, expected one that ends a step, as '\\n'"
      )

  def search(self, desk: strategy_lib.Desk) -> strategy_lib.Course:
    """See `Strategy.search`."""
    self._ask(desk, self.beams * self.width, None)
    beams: list[samples_lib.Sample] = []
    num_steps = 0
    while True:
      found = yield from self._judged(desk)
      # Finished beams compete with unfinished beams.
      beams = self._kept([*filter(self._is_over, beams), *found])
      num_steps += 1
      open_ = [beam for beam in beams if not self._is_over(beam)]
      if desk.is_spent or not open_ or num_steps == self.most_steps:
        break
      for beam in open_:
        self._ask(desk, self.width, beam)
    over = [beam for beam in beams if self._is_over(beam)]
    chosen = sampling.best(over or beams)
    details = {'steps': num_steps, 'scores': sampling.scores(beams)}
    return strategy_lib.Choice(chosen, details=details)

  def _ask(
    self, desk: strategy_lib.Desk, num: int, beam: samples_lib.Sample | None
  ) -> None:
    root = None if beam is None else beam.tag
    per_tree = self.width if beam is None and self.is_apart else num
    for first in range(0, num, per_tree):
      desk.ask(
        per_tree,
        after=beam,
        scorer=self.scorer,
        tag=first // per_tree if root is None else root,
        **self._step(desk),
      )

  def _step(self, desk: strategy_lib.Desk) -> dict:
    settings = desk.question.request.settings
    return {
      'stop': (*settings.stop, self.step_end),
      'max_tokens': self.most_step_tokens or settings.max_tokens,
    }

  def _judged(self, desk: strategy_lib.Desk) -> _Collected:
    """Collects a round; with lookahead, scores are of what would follow."""
    found = yield from collected()
    if not self.lookahead:
      return found
    ahead = {sample: sample for sample in found}
    for _ in range(self.lookahead):
      for sample, end in ahead.items():
        if not self._is_over(end) and not desk.is_spent:
          desk.ask(
            after=end,
            tag=sample,
            temperature=0.0,
            scorer=self.scorer,
            **self._step(desk),
          )
      if not desk.asks:
        break
      for end in (yield from collected()):
        ahead[end.tag] = end
    return [
      sample if end.score is None else _with_score(sample, end.score)
      for sample, end in ahead.items()
    ]

  def _kept(
    self, found: Sequence[samples_lib.Sample]
  ) -> list[samples_lib.Sample]:
    def rank(sample: samples_lib.Sample):
      score = -float('inf') if sample.score is None else sample.score
      return -score, sample.number

    ranked = sorted(found, key=rank)
    if not self.is_apart:
      return ranked[: self.beams]
    best: dict[int, samples_lib.Sample] = {}
    for sample in ranked:
      best.setdefault(sample.tag, sample)
    return list(best.values())

  def _is_over(self, sample: samples_lib.Sample) -> bool:
    """Returns whether no step follows: the answer has ended."""
    return sample.last.stop_reason != self.step_end


def _with_score(sample: samples_lib.Sample, score: float) -> samples_lib.Sample:
  return dataclasses.replace(sample, score=score)


def collected() -> _Collected:
  """Returns the samples that end until nothing is open."""
  found = []
  while (sample := (yield)) is not None:
    found.append(sample)
  return found
