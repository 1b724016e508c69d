"""The pool of pages of an engine: as many as its devices have memory for."""

from typing import Any, NamedTuple

from inference.engine import device_state, engine_config, execution
from inference.engine.spread import placement as placement_lib


class Pool(NamedTuple):
  """The pages of an engine."""

  num_pages: int  # P
  page_tokens: int  # Q
  page_bytes: float  # of a page in all layers, on all devices

  def sizes(
    self, config: engine_config.EngineConfig, backend: execution.Backend
  ) -> dict[str, Any]:
    """Returns the arguments of `device_state.init_state`."""
    return {
      'num_slots': config.max_sequences,
      'num_pages': self.num_pages,
      'page_size': self.page_tokens,
      'kv_dtype': backend.kv_dtype,
      'channels': backend.channels,
      'keeps_hidden': config.speculation == 'head',
    }


def sized(
  placement: placement_lib.Placement,
  config: engine_config.EngineConfig,
  backend: execution.Backend,
  params: device_state.Unread,
  other_bytes: int,
) -> Pool:
  """Returns the pool that an engine has room for.

  Args:
    placement: of the engine.
    config: of the engine.
    backend: of a device.
    params: that are served.
    other_bytes: that a device needs beside weights and pages.

  Raises:
    ValueError: the memory does not hold a page.
  """
  context = config.context(placement.model.max_length)
  token_bytes = backend.bytes_per_token(placement.model)  # of a device
  held = placement.num_bytes(params) + other_bytes
  num_pages = backend.pool_pages(
    config, placement.model, held, placement.device
  )
  page_tokens = config.page_tokens(context)
  page_bytes = page_tokens * token_bytes * placement.num_devices
  return Pool(num_pages, page_tokens, page_bytes)
