"""POST and DELETE /v1/feedback: ratings of answers, stored where it is allowed.

The record of a key says whether its feedback may be stored; on a server without
keys, --server.feedback says so. Deletion is always allowed. The log has the id
and the thumb, and no text of the conversation.
"""

import logging

import fastapi

from checks import expect
from inference.server import service as service_lib
from inference.server.access import keys
from inference.server.api import errors, feedback_schema, schema
from inference.server.records import feedback

_LOG = logging.getLogger('uvicorn.error')


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""

  @app.post('/v1/feedback')
  async def give_feedback(request: fastapi.Request):
    key = request.state.key
    if not is_allowed(service, key):
      raise _refused(has_key=key is not None)

    def checked(raw: bytes) -> feedback_schema.FeedbackRequest:
      body = schema.parsed(feedback_schema.FeedbackRequest, raw, context=1)
      service.find(body.model)
      body.check()
      return body

    body = await service.bodies.worked(request, checked)
    principal = request.state.principal
    try:
      name, created = await service.records.run(
        lambda connection: feedback.add(
          connection,
          principal=principal,
          key_id=key.id if key else '',
          **body.row(),
        )
      )
    except feedback.NotTheirs as error:
      raise _unknown('request_id', body.request_id) from error
    except feedback.Full as error:
      raise errors.ApiError(
        403,
        f'feedback: got {feedback.MOST_ROWS} rows already, expected fewer;'
        ' delete some with DELETE /v1/feedback/{id}',
        param=None,
        code='feedback_full',
      ) from error
    _LOG.info('%s thumb=%s', name, body.thumb)
    return {'id': name, 'object': 'feedback', 'created': int(created)}

  @app.delete('/v1/feedback/{name}')
  async def delete_feedback(name: str, request: fastapi.Request):
    principal = request.state.principal
    if not await service.records.run(feedback.delete, name, principal):
      raise _unknown('id', name)
    return {'object': 'feedback.deleted', 'deleted': 1}

  @app.delete('/v1/feedback')
  async def delete_all_feedback(request: fastapi.Request):
    principal = request.state.principal
    num = await service.records.run(feedback.delete_all, principal)
    return {'object': 'feedback.deleted', 'deleted': num}


def is_allowed(service: service_lib.Service, key: keys.Key | None) -> bool:
  """Returns whether feedback may be stored."""
  return service.config.feedback if key is None else key.allows_feedback


def _refused(*, has_key: bool) -> errors.ApiError:
  fix = (
    'a key that allows feedback'
    if has_key
    else 'a server that was started with --server.feedback'
  )
  return errors.ApiError(
    403,
    f'feedback: got a request that may not be stored, expected {fix}; ask the'
    ' operator',
    param=None,
    code='feedback_not_allowed',
  )


def _unknown(param: str, value: str) -> errors.ApiError:
  return errors.ApiError(
    404,
    f'{param}: got {expect.shown(value)}, expected one of your own',
    param=param,
    code=None,
  )
