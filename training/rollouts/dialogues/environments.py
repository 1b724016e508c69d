"""Environments: episodes of several turns, in which the policy calls tools.

    reset(record) -> messages        step(reply) -> messages, reward, or the end

`play` runs many episodes side by side: each round samples the next turn of all
unfinished episodes, through the sampler of the run. The prompt of a turn is the
prompt of the turn before and the ids after it, so the engine's prefix cache
holds all but the newest of these ids.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from checks import expect
from text.replies import events
from training.rollouts.dialogues import (
  dialogue as dialogue_lib,
  episodes as episodes_lib,
  tools as tools_lib,
)

Message = Mapping[str, Any]


class Step(NamedTuple):
  """The answer of an environment to a turn of the policy."""

  messages: tuple[Message, ...] = ()  # after the turn; none: the episode ends
  reward: float = 0.0  # of the turn; RolloutConfig adds rewards at the end


class Environment(Protocol):
  """The world of a policy in one episode: it starts, and answers each turn."""

  def reset(self, record: Mapping[str, Any]) -> Sequence[Message]:
    """Returns the conversation that the policy answers first."""
    ...

  def step(self, reply: events.Reply, said: Message) -> Step:
    """Returns the messages after a turn, and the reward of the turn.

    Args:
      reply: text, reasoning and calls of the turn.
      said: the turn as a message; its calls have ids that results name.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolUse:
  """Questions that are answered with the help of tools.

  An experiment names this class; `open` gives the environment of one episode.

  Raises:
    ValueError: there are no tools, or a limit is below 1.
  """

  tools: tuple[tools_lib.Tool, ...]
  max_turns: int = 4  # turns of the policy, in an episode
  max_given_tokens: int = 256  # tokens from tools, in an episode

  def __post_init__(self):
    if not self.tools:
      raise ValueError(
        'environment.tools: got none, expected one at least; leave the'
        ' environment out'
      )
    expect.at_least('environment.max_turns', self.max_turns, 1)
    expect.at_least('environment.max_given_tokens', self.max_given_tokens, 1)

  @property
  def schemas(self) -> tuple[Mapping[str, Any], ...]:
    """Returns the descriptions of the tools."""
    return tuple(tool.schema for tool in self.tools)

  def open(self) -> 'ToolEpisode':
    """Returns the environment of a new episode."""
    return ToolEpisode(
      {tool.schema['function']['name']: tool for tool in self.tools}
    )


class ToolEpisode:
  """Runs the calls of each turn; a turn without calls is the last one."""

  def __init__(self, tools: Mapping[str, tools_lib.Tool]):
    self._tools = tools

  def reset(self, record: Mapping[str, Any]) -> Sequence[Message]:
    """Returns the messages of the record, or its prompt as one."""
    for name in ('messages', 'prompt', 'question'):
      found = record.get(name)
      if isinstance(found, str) and found:
        return ({'role': 'user', 'content': found},)
      if isinstance(found, list | tuple) and found:
        last = found[-1].get('role') == 'assistant'
        return tuple(found[:-1] if last else found)
    raise ValueError(
      f'record: got the fields {", ".join(record) or "none"}, expected'
      ' messages, prompt or question'
    )

  def step(self, reply: events.Reply, said: Message) -> Step:
    """Returns the results of the calls of a turn."""
    del reply
    return Step(
      tuple(
        dialogue_lib.result_of(
          call, tools_lib.run(self._tools, **call['function'])
        )
        for call in said.get('tool_calls', ())
      )
    )


class Turn(NamedTuple):
  """A requested turn: the fields of `Ask` that differ."""

  prompt_ids: tuple[int, ...]
  episode: int
  number: int  # number of the turn in its episode
  max_tokens: int


class Sampled(Protocol):
  """A sampled turn, as the sampler of a run returns it."""

  @property
  def ids(self) -> tuple[int, ...]:
    """Returns the ids as sampled, with the stop token."""
    ...

  @property
  def logprobs(self) -> np.ndarray:
    """Returns float32, one per id."""
    ...

  @property
  def versions(self) -> np.ndarray:
    """Returns int32, one per id."""
    ...


class _Played:
  """An episode up to its latest turn."""

  def __init__(self, environment: Environment, record, dialogue):
    self.environment, self.record = environment, record
    self.messages = self.start = tuple(environment.reset(record))
    self.prompt_ids = dialogue.prompt_ids(self.start)
    self.ids: list[int] = []
    self.logprobs: list[float] = []
    self.versions: list[int] = []
    self.trained: list[bool] = []
    self.rewards: dict[int, float] = {}
    self.num_turns = self.num_sampled = 0
    self.text, self.is_over, self.is_truncated = '', False, False

  def add(self, ids, logprobs, versions, *, trained: bool) -> None:
    self.ids += map(int, ids)
    self.logprobs += map(float, logprobs)
    self.versions += map(int, versions)
    self.trained += [trained] * len(ids)

  def episode(self) -> episodes_lib.Episode:
    return episodes_lib.Episode(
      prompt_ids=self.prompt_ids,
      ids=tuple(self.ids),
      text=self.text,
      logprobs=np.asarray(self.logprobs, np.float32),
      versions=np.asarray(self.versions, np.int32),
      is_truncated=self.is_truncated,
      record=self.record,
      messages=self.start,
      trained=np.asarray(self.trained, bool),
      turn_rewards=self.rewards,
    )


def play(
  use: ToolUse,
  dialogue: dialogue_lib.Dialogue,
  records: Sequence[Mapping[str, Any]],
  sample: Callable[[Sequence[Turn]], Sequence[Sampled]],
  *,
  max_tokens: int,
) -> list[episodes_lib.Episode]:
  """Returns one episode per record, played to its end or to a limit.

  Args:
    sample: samples each turn. It may be called max_turns times.
    max_tokens: sampled tokens of an episode, in all turns together.

  The text of an episode is the text of its last turn, without calls and
  reasoning. An episode that ends at a limit (of tokens, turns, or tokens of
  tools) is truncated.

  Raises:
    ValueError: a record has no prompt, or a reward of a turn is not finite.
  """
  expect.at_least('max_tokens', max_tokens, 1)
  played = [_Played(use.open(), record, dialogue) for record in records]
  while waiting := [i for i, each in enumerate(played) if not each.is_over]:
    asked = [
      Turn(
        (*played[i].prompt_ids, *played[i].ids),
        i,
        played[i].num_turns,
        max_tokens - played[i].num_sampled,
      )
      for i in waiting
    ]
    for i, sampled in zip(waiting, sample(asked), strict=True):
      _advance(played[i], sampled, use, dialogue, max_tokens)
  return [each.episode() for each in played]


def _advance(
  played: _Played,
  sampled: Sampled,
  use: ToolUse,
  dialogue: dialogue_lib.Dialogue,
  max_tokens: int,
) -> None:
  """Adds a turn of the policy, and the environment's answer to it."""
  played.add(sampled.ids, sampled.logprobs, sampled.versions, trained=True)
  played.num_sampled += len(sampled.ids)
  is_whole = bool(sampled.ids) and sampled.ids[-1] in dialogue.stop_ids
  reply = dialogue.reply(sampled.ids, is_whole=is_whole)
  said = dialogue_lib.message_of(reply, played.num_turns)
  played.text = reply.text
  played.num_turns += 1
  if not is_whole:
    played.is_over = played.is_truncated = True
    return
  step = played.environment.step(reply, said)
  if step.reward:
    if not np.isfinite(step.reward):
      raise ValueError(
        f'environment: got the reward {step.reward} of a turn, expected a'
        ' finite number'
      )
    played.rewards[len(played.ids) - 1] = float(step.reward)
  if not step.messages:
    played.is_over = True
    return
  given = dialogue.between(played.messages, said, step.messages)
  num_given = len(played.ids) - played.num_sampled + len(given)
  if (
    played.num_turns >= use.max_turns
    or played.num_sampled >= max_tokens
    or num_given > use.max_given_tokens
  ):
    # Results after the last turn would only fill the row.
    played.is_over = played.is_truncated = True
    return
  version = int(sampled.versions[-1])
  played.add(given, [0.0] * len(given), [version] * len(given), trained=False)
  played.messages = (*played.messages, said, *step.messages)
