"""RolloutConfig: how a run samples its own training data.

With `Experiment.rollouts`, the data of a run are prompts (`data.examples =
prompts`). The policy answers each prompt several times, rewards grade the
answers, and the answers become the rows that the steps train. Without rewards
(on-policy distillation), the answers become rows without a grade.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from checks import expect
from data import data_config

NUMERICS = ('fast', 'invariant')
PROMPTS = data_config.PROMPTS
# (episodes) -> one number each; see training/rollouts/dialogues/episodes.py.
Reward = Callable[[Sequence[Any]], Sequence[float]]


@dataclasses.dataclass(kw_only=True)
class RewardConfig:
  """One part of the reward, and its weight in the sum."""

  reward: Reward  # a function, or a frozen dataclass that is called
  # 0: the part is measured and reported, and trains nothing. A verifier beside
  # a proxy shows whether the proxy is being gamed; beside a teacher, whether
  # the student learns the task.
  weight: float = 1.0
  # Name in metrics; if empty, the name of the function or class.
  name: str = ''

  @property
  def label(self) -> str:
    """Returns the name of the part in metrics."""
    named = getattr(self.reward, '__name__', type(self.reward).__name__)
    return self.name or named.lower()


@dataclasses.dataclass(kw_only=True)
class RolloutConfig:
  """The rollouts of a run; read by training/rollouts/."""

  # Parts of the reward. Advantages are made of their weighted sum. With an
  # objective without advantages (on-policy distillation): none, or parts of
  # weight 0.
  rewards: tuple[RewardConfig, ...] = ()
  # None, or an environment of training/rollouts/dialogues/environments.py: the
  # policy calls tools in several turns, which share `max_tokens`.
  environment: Any = None
  # Prompts of a rollout batch. Each prompt is answered
  # objective.advantages.group_size times, and all answers are trained, in steps
  # of data.batch_size answers.
  num_prompts: int = 32
  max_tokens: int = 64  # most sampled tokens of an answer
  temperature: float = 1.0  # of sampling, and of the trained policy
  # Passes over a rollout batch. More passes train longer on answers of an older
  # policy, and need the ratio of the objective.
  inner_epochs: int = 1
  # Rollout batches that are drawn ahead, while the steps run. 0: the weights
  # that a batch trains draw it, and sampler and trainer take turns. S: the
  # weights from before the last S batches draw it, which needs a copy of them
  # and an objective that corrects for it. See training/rollouts/draws/ahead.py.
  staleness: int = 0
  # Devices that only sample: the last ones of the run, which share the
  # sampler's model. The others train. 0: the sampler has its copy of the
  # weights on the first device that trains. See training/rollouts/devices.py.
  sampler_devices: int = 0
  # Whether groups whose answers all have the same reward, which teach nothing,
  # are replaced by groups of further prompts (DAPO's dynamic sampling,
  # arXiv:2503.14476, section 3.2).
  drops_groups_without_signal: bool = False
  # Further rounds of sampling for replacements. After the last round, groups
  # without signal fill the batch.
  max_refills: int = 4
  # Tokens before max_tokens in which a longer answer loses reward, up to
  # overlong_penalty at max_tokens (DAPO's soft overlong punishment, equation
  # 13). 0: none.
  overlong_tokens: int = 0
  overlong_penalty: float = 1.0
  # Whether answers that ended at max_tokens have weight 0 in training. They
  # still count in the mean of their group.
  masks_truncated: bool = False
  # Numerics of the engine and of the trained model: fast | invariant.
  # invariant: an answer has the same bits for any other answers in the batch,
  # and the trainer computes it with the same bits, so that log-probabilities of
  # both agree to the last bit in float32; slower. The gap is in the metrics.
  numerics: str = 'fast'
  # Rollout batches between two tables of samples in samples.jsonl; 0: none.
  samples_every: int = 1
  num_samples: int = 4  # rows of a table: the groups of the first prompts
  # Prompts of the evaluation split that are answered at each evaluation, by the
  # likeliest tokens. 0: all.
  eval_prompts: int = 256

  def validate(
    self, group_size: int, batch_size: int, *, needs_rewards: bool
  ) -> None:
    """Raises ValueError for values that no run can use.

    Args:
      group_size: answers of each prompt, of the objective.
      batch_size: answers of a step, of the data.
      needs_rewards: whether the objective trains rewards.
    """
    for name, least in (
      ('num_prompts', 1),
      ('max_tokens', 1),
      ('inner_epochs', 1),
      ('staleness', 0),
      ('sampler_devices', 0),
      ('max_refills', 0),
      ('overlong_tokens', 0),
      ('samples_every', 0),
      ('num_samples', 0),
      ('eval_prompts', 0),
    ):
      expect.at_least(f'rollouts.{name}', getattr(self, name), least)
    expect.one_of('rollouts.numerics', self.numerics, NUMERICS)
    if not 0 < self.temperature < math.inf:
      raise ValueError(
        f'rollouts.temperature: got {self.temperature}, expected a number above'
        ' 0: the likeliest tokens alone have no other answers to compare with'
      )
    if self.overlong_tokens > self.max_tokens:
      raise ValueError(
        f'rollouts.overlong_tokens: got {self.overlong_tokens}, expected at'
        f' most rollouts.max_tokens = {self.max_tokens}'
      )
    if not 0 <= self.overlong_penalty < math.inf:
      raise ValueError(
        f'rollouts.overlong_penalty: got {self.overlong_penalty}, expected a'
        ' number of at least 0'
      )
    if missing := [
      name
      for name in ('open', 'schemas', 'max_turns', 'max_given_tokens')
      if self.environment is not None and not hasattr(self.environment, name)
    ]:
      raise ValueError(
        f'rollouts.environment: got {self.environment!r} without'
        f' {", ".join(missing)}, expected an environment as'
        ' environments.ToolUse(tools=(tools.Calculator(),))'
      )
    self._check_rewards(group_size, needs_rewards)
    if batch_size % group_size:
      raise ValueError(
        f'data.batch_size: got {batch_size} answers in a step, expected a'
        f' multiple of objective.advantages.group_size = {group_size}: a step'
        ' trains whole groups'
      )
    if self.num_prompts * group_size % batch_size:
      raise ValueError(
        f'rollouts.num_prompts: got {self.num_prompts} prompts with'
        f' {group_size} answers each, expected a multiple of'
        f' {math.lcm(batch_size, group_size) // group_size} prompts: a step'
        f' trains data.batch_size = {batch_size} of the'
        f' {self.num_prompts * group_size} answers'
      )

  def _check_rewards(self, group_size: int, needs_rewards: bool) -> None:
    if not isinstance(self.rewards, tuple | list) or not all(
      isinstance(part, RewardConfig) for part in self.rewards
    ):
      raise ValueError(
        f'rollouts.rewards: got {self.rewards!r}, expected RewardConfigs; list'
        " them in the experiment's file; a flag can set a field of one of them,"
        ' as --config.rollouts.rewards[0].weight=0.5'
      )
    for part in self.rewards:
      if not callable(part.reward) or not math.isfinite(part.weight):
        raise ValueError(
          f'rollouts.rewards: got {part.reward!r} with weight {part.weight},'
          ' expected a function of episodes and a finite number'
        )
    labels = [part.label for part in self.rewards]
    if repeated := sorted({x for x in labels if labels.count(x) > 1}):
      raise ValueError(
        f'rollouts.rewards: got several called {", ".join(repeated)}, expected'
        ' different names; set the field `name` of each'
      )
    if needs_rewards and not self.is_rewarded:
      got = 'weight 0 for all of them' if self.rewards else 'none'
      raise ValueError(
        f'rollouts.rewards: got {got}, expected one part at least that trains;'
        ' set its weight, or take an objective without advantages'
      )
    if not needs_rewards and any(part.weight for part in self.rewards):
      raise ValueError(
        'rollouts.rewards: got weights with an objective that trains no reward,'
        ' expected 0: a part is then measured only; set its weight to 0'
      )
    if not needs_rewards and self.drops_groups_without_signal:
      raise ValueError(
        'rollouts.drops_groups_without_signal: got True with an objective that'
        ' trains no reward, expected False: every answer teaches'
      )
    if self.drops_groups_without_signal and group_size < 2:
      raise ValueError(
        'rollouts.drops_groups_without_signal: got True with groups of 1,'
        ' expected objective.advantages.group_size of at least 2: one answer'
        ' has no other to differ from'
      )

  @property
  def is_rewarded(self) -> bool:
    """Returns whether an answer can have a reward that trains."""
    is_weighted = any(part.weight for part in self.rewards)
    return is_weighted or self.environment is not None

  @property
  def most_tokens(self) -> int:
    """Returns the most tokens after a prompt: sampled, and of tools."""
    given = getattr(self.environment, 'max_given_tokens', 0)
    return self.max_tokens + given

  def steps_per_rollout(self, group_size: int, batch_size: int) -> int:
    """Returns the steps that one rollout batch is trained for."""
    steps = self.num_prompts * group_size // batch_size
    return steps * self.inner_epochs


def group_size_of(objective: Any) -> int:
  """Returns the number of answers to each prompt that an objective compares."""
  advantages = getattr(objective, 'advantages', None)
  return getattr(advantages, 'group_size', 1)
