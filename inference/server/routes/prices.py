"""GET /v1/prices: prices of tokens, for clients that show them to users."""

import fastapi

from inference.server import service as service_lib

_PER_TOKENS = 10**6  # the unit of `ServerConfig.price_prompt`


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.get('/v1/prices')
  async def prices():
    config = service.config
    return {
      'object': 'prices',
      'per_tokens': _PER_TOKENS,
      'prompt': config.price_prompt,
      'cached': config.price_cached,
      'completion': config.price_completion,
    }
