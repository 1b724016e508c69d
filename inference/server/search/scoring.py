"""The scorer that a strategy of a request names.

    "strategy": {"name": "best_of_n", "n": 8, "scorer": "helpful"}
    "strategy": {"name": "best_of_n", "n": 8, "scorer": "unit_tests",
                 "record": {"tests": ["assert add(1, 2) == 3"]}}
    "strategy": {"name": "best_of_n", "n": 8, "scorer": "column_sum"}

Scorers are likelihood, self, the reward models of --server.scorers, and the
verifiers that --server.verifiers allows. The request of a score goes to the
model that computes it; it is admitted and billed like any other.
"""

from collections.abc import Iterable, Mapping, Sequence

from checks import expect
from evals.verifiers import kinds
from inference.search import (
  budget as budget_lib,
  judging,
  options as options_lib,
  samples as samples_lib,
  scorers,
)
from inference.search.routing import (
  efforts as efforts_lib,
  router as router_lib,
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

  Args:
    service: has the scorers.
    model: that answers.
    num_messages: of the prompt.
    asked: the strategy of the body; None: the scorer is that of `spec`, which
      the effort auto has chosen.
    spec: the strategy.

  Raises:
    ApiError: status 400, this server has no such scorer, the strategy scores
      nothing, or the record does not suit the verifier; 503, the reward model
      is not loaded yet.
  """
  name = asked.scorer if asked else spec.scorer or None
  verifier = None
  if name is not None and name in service.verifiers:
    verifier = kinds.named(name)
  record = asked.record if asked else None
  needs_record = verifier is not None and verifier.NEEDS_RECORD
  if (record is not None) != needs_record:
    raise errors.invalid(
      'strategy.record',
      f'got {"no" if record is None else "a"} record with the scorer'
      f' {errors.printable(str(name))}, expected one with a verifier that reads'
      ' it, and none without',
    )
  if name is None:
    return None
  if not spec.is_scored:
    raise errors.invalid(
      'strategy.scorer', f'got one with {spec.name}, which scores nothing'
    )
  is_vote = spec.name == 'self_consistency'
  if name == options_lib.LIKELIHOOD and not is_vote:
    return scorers.MeanLogprob()
  generator, prices = model.generator(), model.admission.prices
  if name == options_lib.SELF:
    costs = budget_lib.of_engine(
      generator.engine, model.digest if model.adapter else '', prices
    )
    return judging.self_verified(generator, costs=costs)
  if verifier is not None:
    try:
      verifier.check(record or {})
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
  known = *options_lib.OF_MODEL[is_vote:], *service.scorers, *service.verifiers
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
    if name in options_lib.OF_MODEL or name in kinds.KINDS:
      raise ValueError(
        f'server.scorers: got the name {name}, which has a meaning of its own,'
        ' expected another; rename it'
      )


def check_efforts(
  routers: Iterable[router_lib.Router],
  named: Iterable[str],
  verifiers: Sequence[str],
) -> None:
  """Refuses efforts of predictors whose scorers this server does not have.

  Raises:
    ValueError: a scorer is unknown here, or reads the record of a request,
      which the effort auto has not.
  """
  known = *options_lib.OF_MODEL, *named, *verifiers
  for name in (name for router in routers for name in router.efforts):
    scorer = efforts_lib.parsed(name).spec.scorer
    if not scorer:
      continue
    wrong = f'server.effort_predictor: got the effort {expect.shown(name)}'
    if scorer not in known:
      fix = 'start the server with it, or fit a predictor of other efforts'
      if scorer in kinds.KINDS:
        fix = f'allow it: --server.verifiers={",".join([*verifiers, scorer])}'
      raise ValueError(
        f'{wrong}, expected a scorer of this server, {", ".join(known)}; {fix}'
      )
    if scorer in kinds.KINDS and kinds.named(scorer).NEEDS_RECORD:
      raise ValueError(
        f'{wrong}, whose verifier reads a record, which requests with the'
        ' effort auto do not have, expected another scorer; fit a predictor of'
        ' other efforts'
      )
