"""From the checked body of a request to the search that will answer it.

An effort of `auto` is chosen here: the prefill of the prompt is a request of
its own, admitted and billed, and the budget of the search pays for it.
"""

from collections.abc import Mapping
import dataclasses
import time
from typing import Any, Protocol

from inference.requests import requests as requests_lib
from inference.search import (
  budget as budget_lib,
  drive,
  options as options_lib,
  reading,
  samples as samples_lib,
  scorers,
  search as search_lib,
)
from inference.search.routing import router as router_lib
from inference.server import service as service_lib
from inference.server.answers import conversations
from inference.server.api import errors, search_schema
from inference.server.search import scoring


class Answer(Protocol):
  """A checked request that a search answers; see `inference.server.answers`."""

  receipt: dict[str, Any] | None  # of the search, once it has ended

  @property
  def asked(self) -> conversations.Asked:
    """The prompt, and what its answers may have."""
    ...

  @property
  def body(self) -> Any:
    """The body of the request, with the fields of `search_schema`."""
    ...

  @property
  def requests(self) -> list[requests_lib.Request]:
    """One request: the settings of each sample."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """A search that has requested nothing yet."""

  search: search_lib.Search
  spec: options_lib.Spec
  budget: budget_lib.Budget
  router: router_lib.Router | None = None  # that has chosen, and is told
  is_slow: bool = False  # its scores are computed in `take`, and take long
  # Of the receipt, beside what the search has.
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


async def opened(
  service: service_lib.Service,
  model: service_lib.ServedModel,
  answer: Answer,
) -> Opened:
  """Returns the search for an answer.

  Raises:
    ApiError: the strategy does not fit the model or the budget, or no effort
      can be chosen; see `ServedModel.submit`.
  """
  began = time.perf_counter()
  body = answer.body
  budget = body.budget.value() if body.budget else budget_lib.Budget()
  prices = model.admission.prices
  if budget.money is not None and prices == type(prices)():
    raise errors.invalid(
      'budget.money',
      f'got {budget.money}, expected none: all prices of this server are 0',
    )
  (request,) = model.asked(answer.requests)
  spec = search_schema.spec(body)
  router = decision = None
  param, effort = search_schema.effort_of(body)
  if effort == search_schema.AUTO:
    router = _router(service, model, param)
    decision = await _decided(router, model, request, budget, param)
    spec = decision.effort.spec
    cap = answer.asked.cap(param, decision.effort.most_reasoning)
    request = dataclasses.replace(
      request, thinking=cap, grammar=None, room=None
    )
    request = model.generator().engine.checked(request)
  question = samples_lib.Question(
    request=request,
    prompt=answer.asked.messages,
    record=(body.strategy and body.strategy.record) or {},
    before=(decision.prefill,) if decision else (),
  )
  scorer = scoring.scorer_of(
    service, model, len(answer.asked.messages), body.strategy, spec
  )
  return Opened(
    search=_search(model, answer.asked, question, spec, scorer, budget, began),
    is_slow=isinstance(scorer, scorers.Verified),
    spec=spec,
    budget=budget,
    router=router,
    notes=decision.told() if decision else {},
  )


def _router(
  service: service_lib.Service, model: service_lib.ServedModel, param: str
) -> router_lib.Router:
  if found := service.routers.get(model.digest):
    return found
  raise errors.ApiError(
    400,
    f'{param}: got auto, expected another effort: this server has no predictor'
    f' for {errors.printable(model.version)}; start it with'
    ' --server.effort_predictor=FILE',
    param=param,
    code='unsupported_parameter',
  )


async def _decided(
  router: router_lib.Router,
  model: service_lib.ServedModel,
  request: requests_lib.Request,
  budget: budget_lib.Budget,
  param: str,
) -> router_lib.Decision:
  """Returns the effort of a request, from a prefill of its own."""
  costs = budget_lib.of_engine(model.generator().engine, request.adapter)
  most = costs.flops(0, len(request.prompt_ids), 1)
  if budget.flops is not None and most > budget.flops:
    raise errors.invalid('budget', _too_small(budget))
  prefill = await _prefill(
    model,
    router.request(
      request.prompt_ids,
      principal=request.principal,
      priority=request.priority,
      adapter=request.adapter,
    ),
  )
  left = None
  if budget.flops is not None:
    left = max(budget.flops - prefill.usage.flops, 0.0)
  try:
    return router.decide(prefill, most=left)
  except ValueError as error:
    message = str(error).removeprefix('budget: ')
    field = param if left is None else 'budget.flops'
    raise errors.invalid(field, message) from error


async def _prefill(
  model: service_lib.ServedModel, request: requests_lib.Request
) -> requests_lib.Completion:
  updates = await model.submit([request])
  try:
    async for _, update in updates:
      if update.completion:
        update.completion.check()
        return update.completion
  finally:
    updates.close()
  raise RuntimeError('search: got no completion of a prefill; report this')


def _search(
  model: service_lib.ServedModel,
  asked: conversations.Asked,
  question: samples_lib.Question,
  spec: options_lib.Spec,
  scorer: samples_lib.Scorer | None,
  budget: budget_lib.Budget,
  began: float,
) -> search_lib.Search:
  generator, request = model.generator(), question.request
  settings, cap = request.settings, request.thinking
  try:
    spec.check_temperature(settings.temperature)
    spec.check_whole(
      has_constraint=settings.constraint is not None, has_cap=cap is not None
    )
    strategy = options_lib.made(
      spec,
      tokenizer=generator.tokenizer,
      scorer=scorer,
      markers=asked.style.reasoning,
      is_open=asked.is_reasoning,
      most_reasoning=cap.most_tokens if cap else None,
    )
  except ValueError as error:
    message = str(error).removeprefix('strategy: ')
    raise errors.invalid('strategy', message) from error
  if spec.name == 'wait':  # the strategy ends the reasoning itself
    request = dataclasses.replace(request, thinking=None, grammar=None)
    question = dataclasses.replace(question, request=request)
  return search_lib.Search(
    strategy,
    question,
    budget=budget,
    costs=budget_lib.of_engine(
      generator.engine, request.adapter, model.admission.prices
    ),
    tokenizer=generator.tokenizer,
    room=drive.room(generator.engine, request),
    read=reading.reader(
      generator.tokenizer, asked.style, is_reasoning=asked.is_reasoning
    ),
    now=began,
  )


def _too_small(budget: budget_lib.Budget) -> str:
  return (
    f'got {budget}, expected enough for the prompt and a token of its answer'
  )


def spent_at_once(budget: budget_lib.Budget) -> errors.ApiError:
  """Returns the error of a budget that is below one token."""
  return errors.invalid('budget', _too_small(budget))
