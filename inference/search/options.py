"""Strategies by the names of users: --strategy of serve.py, and the server's.

    parsed('self_consistency:16')
    parsed('best_of_n:4:column_sum')

The third part names the scorer: likelihood, self, or a verifier of
`evals/verifiers/kinds.py`; at a server, also a reward model.

Imports nothing heavy: serve.py makes flags of `Options`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from checks import expect, flag_field

if TYPE_CHECKING:
  from inference.search import samples as samples_lib, strategy as strategy_lib

# Names, and what their number means; None: they take none.
NAMES = {
  'once': None,
  'best_of_n': 'samples',
  'self_consistency': 'votes at most',
  'beam': 'samples of a step, a multiple of 4',
  'dvts': 'samples of a step, a multiple of 4',
  'revision': 'answers, one after the other',
  'wait': 'ends of the reasoning that are taken back',
}
MOST = 256  # samples of one question
# Scorers that the model itself is.
LIKELIHOOD, SELF = OF_MODEL = 'likelihood', 'self'
_WIDTH = 4  # continuations of a beam, as in Snell et al. 2024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """The name of a strategy, its number, and its scorer.

  Raises:
    ValueError: there is no such strategy, the number is out of range, or the
      strategy cannot use the scorer.
  """

  name: str
  n: int = 1
  scorer: str = ''  # '': the default of the strategy

  def __post_init__(self):
    expect.one_of('strategy', self.name, NAMES)
    meaning = NAMES[self.name]
    if not 1 <= self.n <= MOST:
      raise ValueError(
        f'strategy: got {self.name} with {self.n}, expected 1 to {MOST}'
        f' {meaning or "samples"}'
      )
    if self.name in ('beam', 'dvts') and self.n % _WIDTH:
      raise ValueError(
        f'strategy: got {self.name} with {self.n}, expected {meaning}'
      )
    if self.scorer and not self.is_scored:
      raise ValueError(
        f'strategy: got {self.name} with the scorer'
        f' {expect.shown(self.scorer)}, expected none: it scores nothing'
      )
    if self.name == 'self_consistency' and self.scorer == LIKELIHOOD:
      raise ValueError(
        f'strategy: got {self.name} with the scorer {LIKELIHOOD}, expected'
        ' weights from 0 to 1: self, a reward model or a verifier'
      )

  @property
  def num_sequences(self) -> int:
    """Sequences that run at once, at most."""
    is_parallel = self.name not in ('once', 'revision', 'wait')
    return self.n if is_parallel else 1

  @property
  def is_scored(self) -> bool:
    """Whether a scorer matters to it."""
    return self.name not in ('once', 'wait')

  @property
  def is_in_parts(self) -> bool:
    """Whether an answer is sampled in several parts."""
    return self.name in ('beam', 'dvts', 'revision', 'wait')

  def check_whole(self, *, has_constraint: bool, has_cap: bool) -> None:
    """Refuses what holds a whole answer, where that is sampled in parts.

    Raises:
      ValueError: there is a constraint, or a cap on reasoning.
    """
    if self.is_in_parts and has_constraint:
      raise ValueError(
        f'strategy: got {self.name} with a constraint, expected one of once,'
        ' best_of_n, self_consistency: a grammar holds an answer as a whole'
      )
    if self.is_in_parts and has_cap and self.name != 'wait':
      raise ValueError(
        f'strategy: got {self.name} with a budget of reasoning, expected one of'
        ' once, best_of_n, self_consistency, wait'
      )

  def check_temperature(self, temperature: float) -> None:
    """Refuses samples that would all be the same.

    Raises:
      ValueError: the strategy compares samples, and they are greedy.
    """
    if self.num_sequences > 1 and not temperature:
      raise ValueError(
        f'temperature: got 0 with the strategy {self.name}, expected more than'
        ' 0: all samples would be the same'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How --prompt spends compute; the fields are flags of serve.py."""

  strategy: str | None = flag_field.field(
    None,
    'How to spend more on the completion, NAME:NUMBER or NAME:NUMBER:SCORER: '
    + ', '.join(f'{n}{f":N ({m})" if m else ""}' for n, m in NAMES.items())
    + '. best_of_n, beam and dvts keep the largest --reward_model, else the'
    ' largest mean log-probability; SCORER is a name of --scorer. auto: what'
    ' --effort_predictor expects to be right. If not given, one sample.',
  )
  budget: str | None = flag_field.field(
    None,
    'Most that the strategy may spend, UNIT:NUMBER with commas between several,'
    ' of tokens (sampled, kept or not), flops and seconds. If not given, no'
    ' limit.',
  )
  reasoning_budget: int | None = flag_field.field(
    None,
    'Most tokens of reasoning, between the markers of the chat template; then'
    ' the closing marker is put in. If not given, no limit.',
  )
  reward_model: str | None = flag_field.field(
    None,
    'Frozen directory of a reward model, which scores the samples of'
    ' --strategy.',
    is_path=True,
  )
  scorer: str | None = flag_field.field(
    None,
    'Scorer of the samples of --strategy: likelihood, self (the model is asked'
    ' whether its answer is right), a verifier with --record: number, exact,'
    ' choice, pattern, json_schema, unit_tests (in a sandbox), or column_sum,'
    ' which checks the steps of a sum and needs no record. It weighs the votes'
    ' of self_consistency.',
  )
  record: str | None = flag_field.field(
    None,
    'Fields that a verifier of --scorer reads, as JSON: {"answer": "42"}.',
  )
  effort_predictor: str | None = flag_field.field(
    None,
    'File of python -m training.effort, of the model that answers: it chooses'
    ' with --strategy=auto, within --budget=flops:NUMBER.',
    is_path=True,
  )


def parsed(text: str) -> Spec:
  """Returns the strategy of a text such as 'best_of_n:8'.

  Raises:
    ValueError: there is no such strategy, its number is wrong, or it cannot
      use the scorer.
  """
  name, *rest = text.split(':')
  expect.one_of('strategy', name, NAMES)
  meaning = NAMES[name]
  if meaning is None and not rest:
    return Spec(name=name)
  number, scorer = (*rest, '', '')[:2]
  is_number = number.isascii() and number.isdigit()
  if meaning is None or not is_number or len(rest) > 2 or rest[1:] == ['']:
    expected = f'{name} alone'
    if meaning:
      expected = f'{name}:NUMBER ({meaning}), with :SCORER behind it or not'
    raise ValueError(f'strategy: got {expect.shown(text)}, expected {expected}')
  return Spec(name=name, n=int(number), scorer=scorer)


def made(
  spec: Spec,
  *,
  tokenizer: Any,
  scorer: 'samples_lib.Scorer | None' = None,
  markers: tuple[str, str] | None = None,
  is_open: bool = False,
  most_reasoning: int | None = None,
) -> 'strategy_lib.Strategy':
  """Returns the strategy of a spec.

  Args:
    spec: of the user.
    tokenizer: of the model.
    scorer: of best_of_n, beam, dvts, and, if there is one, of revision and the
      weights of votes; None: the mean log-probability.
    markers: of reasoning, if the model has them.
    is_open: whether the prompt ends inside of reasoning.
    most_reasoning: tokens, which `wait` needs.

  Raises:
    ValueError: `wait` for a model without reasoning, or without its limit.
  """
  from inference.search import scorers
  from inference.search.strategies import (
    forcing,
    revision,
    sampling,
    trees,
    voting,
  )

  score = scorer or scorers.MeanLogprob()
  match spec.name:
    case 'once':
      return sampling.SampleOnce()
    case 'best_of_n':
      return sampling.BestOfN(n=spec.n, scorer=score)
    case 'self_consistency':
      return voting.SelfConsistency(n=spec.n, scorer=scorer)
    case 'beam' | 'dvts':
      return trees.BeamSearch(
        beams=spec.n // _WIDTH,
        width=_WIDTH,
        scorer=score,
        is_apart=spec.name == 'dvts',
      )
    case 'revision':
      return revision.SequentialRevision(
        n=spec.n, tokenizer=tokenizer, scorer=scorer
      )
  if markers is None:
    raise ValueError(
      'strategy: got wait, expected a model whose chat template marks its'
      ' reasoning; choose another strategy'
    )
  if not most_reasoning:
    raise ValueError(
      'strategy: got wait without a budget of reasoning, expected one, which'
      ' ends it; give the most tokens of reasoning'
    )
  return forcing.BudgetForcing(
    tokenizer=tokenizer,
    most_reasoning=most_reasoning,
    num_waits=spec.n,
    opening=markers[0],
    closing=markers[1],
    is_open=is_open,
  )
