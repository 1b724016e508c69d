"""The scorer that a strategy of a request names.

    "strategy": {"name": "best_of_n", "n": 8, "scorer": "helpful"}
    "strategy": {"name": "best_of_n", "n": 8, "scorer": "unit_tests",
                 "record": {"tests": ["assert add(1, 2) == 3"]}}

Scorers are likelihood, self, the reward models of --server.scorers, and the
verifiers that --server.verifiers allows. The request of a score goes to the
model that computes it; it is admitted and billed like any other.
"""

from collections.abc import Mapping

from evals.verifiers import kinds
from inference.search import (
  budget as budget_lib,
  judging,
  options as options_lib,
  samples as samples_lib,
  scorers,
)
from inference.server import service as service_lib
from inference.server.api import errors, search_schema


def scorer_of(
  service: service_lib.Service,
  model: service_lib.ServedModel,
  num_messages: int,
  asked: search_schema.Strategy | None,
  spec: options_lib.Spec,
) -> samples_lib.Scorer | None:
  """Returns the scorer of a request; None: the default of its strategy.

  Raises:
    ApiError: status 400, this server has no such scorer, the strategy scores
      nothing, or the record does not suit the verifier; 503, the reward model
      is not loaded yet.
  """
  name = asked.scorer if asked else None
  is_verifier = name in service.verifiers
  if asked and (asked.record is not None) != is_verifier:
    raise errors.invalid(
      'strategy.record',
      f'got {"a" if asked.record is not None else "no"} record with the scorer'
      f' {errors.printable(str(name))}, expected one with a verifier, and none'
      ' without',
    )
  if name is None:
    return None
  if not spec.is_scored:
    raise errors.invalid(
      'strategy.scorer', f'got one with {spec.name}, which scores nothing'
    )
  is_vote = spec.name == 'self_consistency'
  if name == scorers.LIKELIHOOD and not is_vote:
    return scorers.MeanLogprob()
  generator, prices = model.generator(), model.admission.prices
  if name == scorers.SELF:
    costs = budget_lib.of_engine(
      generator.engine, model.digest if model.adapter else '', prices
    )
    return judging.self_verified(generator, costs=costs)
  if is_verifier:
    assert asked
    verifier = kinds.named(name)
    try:
      verifier.check(asked.record or {})
    except (ValueError, RuntimeError) as error:  # it may have no sandbox
      raise errors.invalid('strategy.record', str(error)) from error
    return scorers.Verified(verifier)
  if (judge := service.scorers.get(name)) is not None:
    loaded = judge.generator()
    if loaded.tokenizer.encode(_PROBE) != generator.tokenizer.encode(_PROBE):
      raise errors.invalid(
        'strategy.scorer',
        f'got {name}, whose tokenizer is not that of'
        f' {errors.printable(model.version)}, expected a scorer of its own',
      )
    return judging.rewarded(
      loaded,
      costs=budget_lib.of_engine(loaded.engine, '', prices),
      num_turns=num_messages + 1,
      place=judge,
      link=judging.sigmoid if is_vote else float,
    )
  known = *scorers.OF_MODEL[is_vote:], *service.scorers, *service.verifiers
  raise errors.invalid(
    'strategy.scorer',
    f'got {errors.printable(name)}, expected one of {", ".join(known)}',
  )


# A text that tokenizers cut in different ways.
_PROBE = 'Antidisestablishmentarianism: 12,345 + 67 = ?\n\tif x: naïve\n'


def check_names(
  named: Mapping[str, object], verifiers: tuple[str, ...]
) -> None:
  """Refuses names of scorers that have a meaning of their own.

  Raises:
    ValueError: a name is taken, or a verifier is unknown.
  """
  for name in verifiers:
    if name not in kinds.KINDS:
      raise ValueError(
        f'server.verifiers: got {name}, expected some of'
        f' {", ".join(kinds.KINDS)}'
      )
  for name in named:
    if name in scorers.OF_MODEL or name in kinds.KINDS:
      raise ValueError(
        f'server.scorers: got the name {name}, which has a meaning of its own,'
        ' expected another; rename it'
      )
