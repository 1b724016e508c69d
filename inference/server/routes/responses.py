"""POST /v1/responses, and GET and DELETE of the responses that are stored.

A response is stored if its client asks for it. The default of `store` is true,
as at OpenAI, so that clients can continue a response by its id. With
--server.store_days=0 nothing is stored.
"""

from collections.abc import AsyncGenerator
import contextlib
import functools
import json
from typing import Any

import fastapi
from fastapi import responses as http_responses

from checks import expect
from inference.server import service as service_lib
from inference.server.answers import response_events, responses
from inference.server.api import errors, response_schema, schema
from inference.server.http import streams
from inference.server.records import responses as store_lib
from inference.server.routes import generation
from inference.server.search import running

_Answer = responses.Answer | functools.partial[responses.Answer]
_JSON = 'application/json'
_MOST_LISTED, _LISTED = 100, 20  # input items of an answer, as at OpenAI
_BYTES_PER_CHARACTER = 4
_OVERHEAD = 2**20  # bytes of JSON around the texts of a conversation


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""
  store = service.store

  @app.post('/v1/responses')
  async def create_response(request: fastapi.Request):
    principal = request.state.principal
    body, model, answer = await service.bodies.worked(
      request, lambda raw: _prepared(service, principal, raw)
    )
    if answer is None:
      answer = await _continued(service, model, principal, body)
    answer = await generation.compiled(service, answer)
    if body.is_search:
      updates = await running.begin(service, model, answer)
    else:
      updates = await model.submit(answer.requests, is_stream=answer.is_stream)
    events = _stored(service, answer, principal, updates)
    if answer.is_stream:
      return streams.EventStream(
        _lines(answer, events),
        updates,
        ping_seconds=service.config.ping_seconds,
      )
    return await streams.unless_disconnected(
      request, _whole(service, answer, events, updates)
    )

  @app.get('/v1/responses/{response_id}')
  async def get_response(request: fastapi.Request, response_id: str):
    _check_query(request, ())
    with _found('response_id'):
      row = await store.get(request.state.principal, response_id)
    return http_responses.Response(row.response, media_type=_JSON)

  @app.delete('/v1/responses/{response_id}')
  async def delete_response(request: fastapi.Request, response_id: str):
    _check_query(request, ())
    with _found('response_id'):
      await store.delete(request.state.principal, response_id)
    return {'id': response_id, 'object': 'response', 'deleted': True}

  @app.get('/v1/responses/{response_id}/input_items')
  async def list_input_items(request: fastapi.Request, response_id: str):
    query = _check_query(request, ('after', 'limit', 'order'))
    with _found('response_id'):
      row = await store.get(request.state.principal, response_id)
    return _listed(json.loads(row.input), query)


def _prepared(
  service: service_lib.Service, principal: str, raw: bytes
) -> tuple[
  response_schema.ResponseRequest,
  service_lib.ServedModel,
  _Answer | None,
]:
  """Returns a checked body; its answer too, unless it continues another."""
  body = schema.parsed(
    response_schema.ResponseRequest, raw, context=service.context
  )
  model = service.find(body.model)
  body.check()
  if body.store and not service.store.is_kept:
    raise errors.ApiError(
      400,
      'store: got true, expected false: this server keeps no responses',
      param='store',
      code='unsupported_parameter',
    )
  if body.previous_response_id is not None:
    return body, model, None
  return body, model, _answer(service, model, principal, body)


def _answer(
  service: service_lib.Service,
  model: service_lib.ServedModel,
  principal: str,
  body: response_schema.ResponseRequest,
  rows: tuple[store_lib.Row, ...] = (),
) -> _Answer:
  make = functools.partial(
    responses.Answer,
    model.generator(),
    body,
    principal=principal,
    before=store_lib.items(rows),
    is_stored=service.store.is_kept and body.store is not False,
    reply_format=service.config.reply_format,
    efforts=service.config.efforts,
  )
  return make if body.is_constrained else make()


async def _continued(
  service: service_lib.Service,
  model: service_lib.ServedModel,
  principal: str,
  body: response_schema.ResponseRequest,
) -> _Answer:
  """Returns the answer of a request that continues a stored response."""
  most = model.generator().most_characters * _BYTES_PER_CHARACTER + _OVERHEAD
  with _found('previous_response_id'):
    rows = await service.store.conversation(
      principal, body.previous_response_id or '', most_bytes=most
    )
  return await service.bodies.in_thread(
    _answer,
    service,
    model,
    principal,
    body,
    tuple(rows),
    size=sum(row.size for row in rows),
  )


async def _stored(
  service: service_lib.Service,
  answer: responses.Answer,
  principal: str,
  updates: Any,
) -> AsyncGenerator[response_events.Event]:
  """Yields the events; before the last one the response is on disk."""
  async with contextlib.aclosing(answer.events(updates)) as events:
    async for event in events:
      response = answer.response
      is_last = response['status'] in ('completed', 'incomplete')
      if (
        is_last
        and response['store']
        and event['type'] == (f'response.{response["status"]}')
      ):
        row = await service.bodies.in_thread(answer.row, size=answer.size)
        await service.store.put(
          principal, response['id'], row, response['previous_response_id']
        )
      yield event


async def _lines(
  answer: responses.Answer, events: AsyncGenerator[response_events.Event]
) -> AsyncGenerator[str]:
  """Yields server-sent events; the type of each is its `event`, too."""
  try:
    async with contextlib.aclosing(events):
      async for event in events:
        yield _line(event)
  except Exception as error:
    # The status 200 is sent.
    for event in answer.failed(str(errors.failure(error))):
      yield _line(event)


def _line(event: response_events.Event) -> str:
  return f'event: {event["type"]}\ndata: {streams.event_json(event)}\n\n'


async def _whole(
  service: service_lib.Service,
  answer: responses.Answer,
  events: AsyncGenerator[response_events.Event],
  updates: Any,
) -> http_responses.Response:
  with contextlib.closing(updates):
    async with contextlib.aclosing(events):
      async for _ in events:
        pass
  return await service.bodies.in_thread(
    streams.written, answer.response, size=answer.size
  )


@contextlib.contextmanager
def _found(param: str):
  """Turns a missing response, or one too long to continue, into an error."""
  try:
    yield
  except store_lib.Missing as error:
    raise errors.ApiError(
      404,
      f'{param}: got {expect.shown(str(error))}, expected the id of a response'
      ' that this key has stored; it may have been deleted, or be too old',
      param=param,
      code='response_not_found',
    ) from None
  except store_lib.TooLong:
    raise errors.invalid(
      param,
      'got a conversation with more text than fits into the context of this'
      ' model, expected a shorter one; begin a new one',
    ) from None


def _check_query(
  request: fastapi.Request, names: tuple[str, ...]
) -> dict[str, str]:
  """Returns the query parameters; refuses unknown and repeated ones."""
  query = request.query_params
  for name in query:
    if name not in names or len(query.getlist(name)) > 1:
      expected = ', '.join(names) or 'none'
      raise errors.ApiError(
        400,
        f'{errors.printable(name)}: got a query parameter that this route does'
        f' not know, or twice, expected {expected}; leave it out',
        param=name,
        code='unsupported_parameter',
      )
  return dict(query)


def _listed(
  items: list[dict[str, Any]], query: dict[str, str]
) -> dict[str, Any]:
  """Returns a page of items."""
  limit, order = query.get('limit', str(_LISTED)), query.get('order', 'desc')
  if not (limit.isascii() and limit.isdigit() and len(limit) <= 3) or not (
    1 <= int(limit) <= _MOST_LISTED
  ):
    raise errors.invalid(
      'limit', f'got {expect.shown(limit)}, expected 1 to {_MOST_LISTED}'
    )
  if order not in ('asc', 'desc'):
    raise errors.invalid(
      'order', f"got {expect.shown(order)}, expected 'asc' or 'desc'"
    )
  if order == 'desc':
    items = items[::-1]
  if (after := query.get('after')) is not None:
    places = [n for n, item in enumerate(items, 1) if item['id'] == after]
    if not places:
      raise errors.invalid(
        'after', f'got {expect.shown(after)}, expected the id of an item'
      )
    items = items[places[0] :]
  page = items[: int(limit)]
  return {
    'object': 'list',
    'data': page,
    'first_id': page[0]['id'] if page else '',
    'last_id': page[-1]['id'] if page else '',
    'has_more': len(items) > len(page),
  }
