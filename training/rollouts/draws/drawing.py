"""Drawing: episodes of a rollout batch, a function of seed, index and weights.

Neither prompts nor seeds depend on earlier batches, so a run that resumes draws
the same tokens again.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from data.examples import prompts as prompts_lib
from evals import sampling
from training.rollouts import rollout_config
from training.rollouts.dialogues import (
  dialogue as dialogue_lib,
  environments,
  episodes as episodes_lib,
)
from training.rollouts.draws import scoring

_PROMPTS, _REFILLS, _SAMPLES = range(3)  # streams of numbers of a seed


class Drawn(NamedTuple):
  """The episodes of a rollout batch; groups are side by side."""

  index: int
  version: int  # steps of the weights that drew the episodes
  episodes: tuple[episodes_lib.Episode, ...]
  scored: scoring.Scored
  share_without_signal: float  # of all groups that were drawn
  num_rounds: int  # rounds of sampling: 1, and the rounds for replacements
  failed: Mapping[str, float]  # share of all answers, see `Scored.failures`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawer:
  """Draws the rollout batches of a run."""

  config: rollout_config.RolloutConfig
  prompts: prompts_lib.Prompts
  group_size: int
  seed: int
  stop_ids: tuple[int, ...]
  stop: tuple[str, ...]
  dialogue: dialogue_lib.Dialogue | None = None  # set with an environment

  def draw(self, sampler: sampling.Sampler, index: int, version: int) -> Drawn:
    """Returns a rollout batch, sampled by the sampler's weights.

    With `drops_groups_without_signal`, further prompts replace groups in which
    all rewards are the same, in at most `max_refills` more rounds; if groups
    are still missing, groups without signal fill the batch.
    """
    config, size = self.config, self.group_size
    wanted = config.num_prompts
    kept: list[tuple[list[episodes_lib.Episode], scoring.Scored]] = []
    spare: list[tuple[list[episodes_lib.Episode], scoring.Scored]] = []
    most = 1 + config.max_refills * config.drops_groups_without_signal
    num_rounds, num_answers = 0, 0
    failures: collections.Counter[str] = collections.Counter()
    while len(kept) < wanted and num_rounds < most:
      found = self._round(sampler, index, num_rounds)
      scored = scoring.score(config, found)
      failures.update(scored.failures)
      num_answers += len(found)
      signal_G = scoring.has_signal(scored.total_N, size)
      for g, has_signal in enumerate(signal_G.tolist()):
        own = slice(g * size, (g + 1) * size)
        group = found[own], _cut(scored, own)
        is_kept = has_signal or not config.drops_groups_without_signal
        (kept if is_kept else spare).append(group)
      num_rounds += 1
    without = len(spare) + sum(
      not scoring.has_signal(scored.total_N, size)[0] for _, scored in kept
    )
    share = without / (len(kept) + len(spare))
    groups = (kept + spare)[:wanted]
    return Drawn(
      index=index,
      version=version,
      episodes=tuple(each for found, _ in groups for each in found),
      scored=_joined([scored for _, scored in groups]),
      share_without_signal=share,
      num_rounds=num_rounds,
      failed={name: n / num_answers for name, n in failures.items()},
    )

  def _round(
    self, sampler: sampling.Sampler, index: int, number: int
  ) -> list[episodes_lib.Episode]:
    """Returns the episodes of one round of sampling, group by group."""
    config = self.config
    stream, first = _PROMPTS, index * config.num_prompts
    if number:
      stream = _REFILLS
      first = (index * config.max_refills + number - 1) * config.num_prompts
    asked = self.prompts.shuffled(
      first, config.num_prompts, folded(self.seed, stream)
    )
    return episodes_of(
      sampler,
      asked,
      [
        sampling.Ask(
          prompt_ids=prompt.ids,
          seed=folded(self.seed, _SAMPLES, index, number, i),
          max_tokens=config.max_tokens,
          num_samples=self.group_size,
          temperature=config.temperature,
          stop_ids=self.stop_ids,
          stop=self.stop,
        )
        for i, prompt in enumerate(asked)
      ],
      self.config.environment,
      self.dialogue,
    )


def episodes_of(
  sampler: sampling.Sampler,
  prompts: Sequence[prompts_lib.Prompt],
  asks: Sequence[sampling.Ask],
  use: environments.ToolUse | None = None,
  dialogue: dialogue_lib.Dialogue | None = None,
) -> list[episodes_lib.Episode]:
  """Returns the sampled episodes; the episodes of a prompt are side by side.

  Args:
    use: environment of episodes of several turns, with its `dialogue`.
  """
  if use is not None:
    assert dialogue is not None
    return _played(sampler, prompts, asks, use, dialogue)
  return [
    episodes_lib.Episode(
      prompt_ids=prompt.ids,
      ids=sample.ids,
      text=sample.text,
      logprobs=sample.logprobs,
      versions=sample.versions,
      is_truncated=sample.is_truncated,
      record=prompt.record,
      messages=prompt.messages,
    )
    for prompt, samples in zip(prompts, sampler.sample(asks), strict=True)
    for sample in samples
  ]


def _played(
  sampler: sampling.Sampler,
  prompts: Sequence[prompts_lib.Prompt],
  asks: Sequence[sampling.Ask],
  use: environments.ToolUse,
  dialogue: dialogue_lib.Dialogue,
) -> list[episodes_lib.Episode]:
  """Returns the episodes of an environment, all played side by side."""
  # An episode is one sample of an ask: each of its turns has its own seed.
  own = [(ask, r) for ask in asks for r in range(ask.num_samples)]
  records = [
    prompt.record
    for prompt, ask in zip(prompts, asks, strict=True)
    for _ in range(ask.num_samples)
  ]

  def sample(turns: Sequence[environments.Turn]) -> list[sampling.Sample]:
    found = sampler.sample(
      [
        dataclasses.replace(
          own[turn.episode][0],
          prompt_ids=turn.prompt_ids,
          seed=folded(
            own[turn.episode][0].seed, own[turn.episode][1], turn.number
          ),
          max_tokens=turn.max_tokens,
          num_samples=1,
          stop_ids=dialogue.stop_ids,
          stop=(),  # a turn ends with an id, after which the template writes on
        )
        for turn in turns
      ]
    )
    return [samples[0] for samples in found]

  most = max((ask.max_tokens for ask in asks), default=1)
  return environments.play(use, dialogue, records, sample, max_tokens=most)


def folded(seed: int, *numbers: int) -> int:
  """Returns a seed of 64 bits, a hash of a seed and of numbers."""
  # NumPy joins the 32-bit words of numbers: the seed always has two words, for
  # any value.
  words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, *numbers]
  sequence = np.random.SeedSequence(words)
  return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _cut(scored: scoring.Scored, own: slice) -> scoring.Scored:
  return scoring.Scored(
    total_N=scored.total_N[own],
    parts={name: values[own] for name, values in scored.parts.items()},
  )


def _joined(scored: Sequence[scoring.Scored]) -> scoring.Scored:
  return scoring.Scored(
    total_N=np.concatenate([each.total_N for each in scored]),
    parts={
      name: np.concatenate([each.parts[name] for each in scored])
      for name in scored[0].parts
    },
  )
