"""How the arguments and results of an engine's programs lie over devices.

A spec stands for all arrays below it. Arguments say themselves how they lie.
"""

from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from inference.engine import device_state
from inference.engine.compiled import jitted, lowering, verification
from models import kv_cache, model_config
from parallel.tensor import ports

_ALL = P()  # all devices have the same
ROWS = P(ports.AXIS)  # of a table
LOGITS = P(None, ports.AXIS)  # [R, V], and token counts


class Form(NamedTuple):
  """The results of a program, and the arguments that it donates."""

  results: Any  # None: as the arguments that are donated
  donated: tuple[int, ...] = ()


def alike(donated: tuple[int, ...] = ()) -> Form:
  """Returns the form of a program whose results all devices have."""
  return Form(_ALL, donated)


def state(model: model_config.ModelConfig, keeps_hidden: bool = False) -> Any:
  """Returns the specs of the state of an engine.

  Args:
    model: that is served.
    keeps_hidden: whether the last pages are those of final hidden states.
  """
  rows, _ = kv_cache.rows_and_width(model)
  # [P, Q, Y, C] and the scales [P, Q, Y]: a device has the pages of its heads.
  # The latents of a token belong to all heads.
  pages = _ALL if rows == 1 else P(None, None, ports.AXIS)
  pages = (pages,) * model.num_layers
  if keeps_hidden:
    pages = (*pages, _ALL)
  slots: Any = dict.fromkeys(device_state.Slots._fields, _ALL)
  slots['seen_BV'] = LOGITS
  return device_state.State(pages, device_state.Slots(**slots))  # pyright: ignore


def forms(
  model: model_config.ModelConfig, keeps_hidden: bool = False
) -> dict[Any, Form]:
  """Returns the form of each jitted function; arguments are of `state`."""
  specs = state(model, keeps_hidden)
  pages, slots = specs
  return {
    jitted.decode_steps: Form((specs, _ALL), (1,)),
    jitted.prefill: Form((pages, LOGITS, _ALL, _ALL, _ALL), (1,)),
    jitted.forward: Form((pages, LOGITS, _ALL), (1,)),
    jitted.put_adapter: Form(None, (0,)),
    jitted.sample: Form((slots, _ALL), (0,)),
    verification.verify: Form((pages, P(None, None, ports.AXIS)), (1,)),
    verification.accept: Form((slots, _ALL), (0,)),
    verification.accept_beside: Form((slots, _ALL), (0,)),
    device_state.seat: Form(slots, (0,)),
    device_state.recount: Form(slots, (0,)),
    lowering.copy_pages: Form(pages, (0,)),
  }
