"""The routes of an administrator: versions and their traffic.

    GET    /admin/models                   all versions, with state and memory
    POST   /admin/models                   loads a frozen directory, or an
                                           adapter beside its base
    GET    /admin/models/{NAME@DIGEST}
    DELETE /admin/models/{NAME@DIGEST}     drains a version, then unloads it
    GET    /admin/traffic                  weights and shadows of each name
    POST   /admin/traffic                  sets weights and shadows of one name

A version loads beside the others, in a thread of its own, and gets no traffic
until it is given a weight. Only the first version of a new name answers it as
soon as it is ready. To roll back, set the earlier weights again. All these
routes need the key of an admin, see `access.api_keys`.
"""

from collections.abc import Mapping
from typing import Any

import fastapi
from fastapi import responses

from inference.server import (
  engine_loop as engine_loop_lib,
  service as service_lib,
)
from inference.server.api import admin_schema, errors, schema
from inference.server.versions import fingerprint, traffic as traffic_lib

DRAINING = 'draining'


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""
  versions = service.versions

  @app.get('/admin/models')
  async def admin_models():
    return {
      'object': 'list',
      'data': [_described(service, each) for each in versions.all()],
    }

  @app.post('/admin/models')
  async def load(request: fastapi.Request):
    loader = service.loader

    def prepared(raw: bytes) -> service_lib.ServedModel:
      body = schema.parsed(admin_schema.LoadRequest, raw, context=1)
      body.check()
      if loader is None:
        raise _cannot_load()
      if loader.is_adapter(body.path):
        body.check_adapter()
        return loader.adapter_asked(
          body.path, body.name, base=body.base, models=versions.all()
        )
      body.check_whole()
      return loader.load_asked(body.path, body.name, kv_memory=body.kv_memory)

    model = await service.bodies.worked(request, prepared, may_block=True)
    # The check and the start are one step of the event loop: if two versions
    # are asked for at once, the second one counts the memory of the first.
    if loader is not None:
      loader.check_memory(model, pending=_pending(service))
    versions.load(model)
    return responses.JSONResponse(_described(service, model), 202)

  @app.get('/admin/models/{version:path}')
  async def admin_model(version: str):
    return _described(service, versions.version(version))

  @app.delete('/admin/models/{version:path}')
  async def unload(version: str):
    model = versions.version(version)
    versions.start_unloading(model)
    return responses.JSONResponse(_described(service, model), 202)

  @app.get('/admin/traffic')
  async def traffic():
    return {'object': 'list', 'data': _all_traffic(service)}

  @app.post('/admin/traffic')
  async def set_traffic(request: fastapi.Request):

    def prepared(raw: bytes) -> tuple[str, traffic_lib.Traffic]:
      body = schema.parsed(admin_schema.TrafficRequest, raw, context=1)
      body.check()
      return body.name, _traffic(service, body)

    versions.set_traffic(*await service.bodies.worked(request, prepared))
    return {'object': 'list', 'data': _all_traffic(service)}


def _described(
  service: service_lib.Service, model: service_lib.ServedModel
) -> dict[str, Any]:
  shadows = service.versions.traffic().get(model.name)
  shadow_share = shadows.shadows.get(model.digest, 0.0) if shadows else 0.0
  return {
    'id': model.version,
    'object': 'model_version',
    'name': model.name,
    'state': DRAINING if model.is_draining else model.state,
    'error': None if model.failure is None else _line(model.failure),
    'share': service.versions.share(model),
    'shadow_share': shadow_share,
    'num_requests': model.num_held,
    'context': model.context,
    'memory': model.memory and model.memory.as_json(),
    'digests': fingerprint.digests(
      model.manifest, model.loaded(), model.adapter
    ),
    'base': model.base and model.base.version,
  }


def _line(error: Exception) -> str:
  """Returns an error as one line of at most a few hundred characters."""
  return errors.printable(str(error) or type(error).__name__, 500)


def _all_traffic(service: service_lib.Service) -> list[dict[str, Any]]:
  by_digest = {
    (each.name, each.digest): each.version for each in service.versions.all()
  }

  def named(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {
      by_digest[name, digest]: value
      for digest, value in values.items()
      if (name, digest) in by_digest
    }

  return [
    {
      'name': name,
      'weights': named(name, each.weights),
      'shadows': named(name, each.shadows),
      'by_principal': each.is_by_principal,
    }
    for name, each in service.versions.traffic().items()
  ]


def _traffic(
  service: service_lib.Service, body: admin_schema.TrafficRequest
) -> traffic_lib.Traffic:
  """Returns the traffic that a body asks for, checked.

  Raises:
    ApiError: status 404, a version does not exist; 409, no version with a
      weight is ready; 400, a shadow has another tokenizer than the others.
  """

  def found(values: Mapping[str, float]):
    return {
      service.versions.of_name(body.name, version): value
      for version, value in values.items()
    }

  weights, shadows = found(body.weights), found(body.shadows or {})
  answering = [model for model, weight in weights.items() if weight > 0]
  if answering and not any(
    model.state == engine_loop_lib.READY for model in answering
  ):
    raise errors.ApiError(
      409,
      f'weights: got no version of {body.name!r} that is ready, expected at'
      ' least one with a weight above 0; wait for GET /admin/models to say so',
      param='weights',
      code='not_ready',
    )
  tokenizers = {
    fingerprint.digests(model.manifest, None)['tokenizer']
    for model in (*answering, *shadows)
  }
  if shadows and len(tokenizers) > 1:
    raise errors.invalid(
      'shadows',
      'got a version with another tokenizer than the versions it copies,'
      ' expected the same: a copy has the same token ids',
    )
  return traffic_lib.Traffic(
    weights={model.digest: weight for model, weight in weights.items()},
    shadows={model.digest: share for model, share in shadows.items()},
    is_by_principal=bool(body.by_principal),
  )


def _pending(service: service_lib.Service) -> int:
  """Returns the bytes that loading versions will take."""
  return sum(
    each.memory.total
    for each in service.versions.all()
    if each.memory and each.state == engine_loop_lib.LOADING
  )


def _cannot_load() -> errors.ApiError:
  return errors.ApiError(
    403,
    'path: got a model to load, expected none: this server has no loader',
    param='path',
    code='no_models_root',
  )
