"""Execution: the way in which a model is computed on one set of devices.

`ModelConfig` defines the function of a parameter tree and travels with the
weights. An `Execution` belongs to one run; it never changes that function. Its
fields are ports: the model calls them with whole arrays and knows no devices.
`parallel/` has the ports that spread work over a mesh; `training/execution.py`
and `inference/engine/execution.py` choose the ports of a run. The default ports
compute everything in place.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from models.attention import cached, dense
from models.layers import cross_entropy, table
from models.linear import plain
from models.linear.stored import product as stored_product
from models.moe import dispatch

# Rematerialisation: the activations that are stored for the backward pass,
# besides the input of each layer. none: all activations; minimal: the results
# of the matrix products; full: no activations; offload: no activations, and the
# inputs wait in host memory.
REMAT = ('none', 'minimal', 'full', 'offload')

# (q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT, dropout, form) -> out_BTHC:
# causal; `form` is a `models.attention.form.Form`.
Attend = Callable[..., jax.Array]
# (q_BTHC, cache, positions_BT, form) -> out_BTHC, over one layer's cache.
AttendCached = Callable[..., jax.Array]
# (hidden_BTD, head_VD, targets_BT, weights_BT, form) -> sums.
WeightedNll = Callable[..., cross_entropy.LossSums]
# (x[..., I], w_IO, bias_O | None, dtype) -> y[..., O]
Linear = Callable[..., Any]
# (table, ids_BT) -> rows_BTD
LookUp = Callable[..., jax.Array]
# (hidden[..., D], head_VD, dtype) -> float32 logits[..., V]
Unembed = Callable[..., jax.Array]
# (logits[..., V], spare_ids) -> logits without these ids
Masked = Callable[..., jax.Array]
# (logits[..., V], spare_ids, temperature) -> log-probabilities [..., V]
LogSoftmax = Callable[..., jax.Array]
# (function, x[..., I]) -> function(x), for a function of each row [I] by
# itself.
ByRow = Callable[..., Any]
ByHead = Callable[..., jax.Array]
# (x[..., I], name) -> the mean of the squares of all heads [..., 1], float32;
# name is that of the norm, query_norm or key_norm.
HeadsMeanSquare = Callable[[jax.Array, str], jax.Array]
# (x_BTD, ids_BTA, gates_BTA, kernels, dtype) -> y_BTD, see
# models/moe/dispatch.py.
ApplyExperts = Callable[..., jax.Array]
# (apply_layer, stacked_params, x_BTD, shared, key) -> (x_BTD, sums), where
# apply_layer(layer_params, x_BTD, shared, key) -> (x_BTD, sums). The batch is
# the first axis of x and of each leaf of `shared`. The result adds up the sums.
RunLayers = Callable[..., tuple[jax.Array, Any]]


def at_once(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
  """Applies a function of rows to all rows together."""
  return function(x)


def on_all_heads(
  function: Callable[[jax.Array, jax.Array], jax.Array],
  x_BTHI: jax.Array,
  w_UHC: jax.Array,
) -> jax.Array:
  """Applies a function of heads to all heads together."""
  return function(x_BTHI, w_UHC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """The ports of a model and its rematerialisation policy.

  Hashable, as a linen module has to be. A pass with a cache uses
  `attend_cached` in place of `attend`, and neither `weighted_nll` nor
  `run_layers`.
  """

  remat: str = 'none'  # one of REMAT
  attend: Attend = dense.attend
  # Most documents of a row that `attend` relies on; 0: any number.
  max_documents: int = 0
  attend_cached: AttendCached = cached.attend
  weighted_nll: WeightedNll = cross_entropy.chunked_nll
  linear: Linear = plain.linear
  # Of the products whose results are added to the stream, `out` and `down`:
  # devices may each hold some of their inputs. None: as `linear`.
  joined: Linear | None = None
  # Of the products whose results every head reads, in latent attention. None:
  # as `linear`.
  shared: Linear | None = None
  exact_linear: Linear = plain.exact_linear  # for routers
  look_up: LookUp = table.look_up  # of the embedding
  unembed: Unembed = plain.unembed
  masked: Masked = cross_entropy.masked
  log_softmax: LogSoftmax = cross_entropy.log_softmax  # of whole rows
  # Of kernels and tables in fewer bits.
  stored: stored_product.Computed = stored_product.in_blocks
  by_row: ByRow = at_once  # for sums within a row: norms and routing
  # Of products of each head by itself, (function, x_BTHI, w_UHC) -> y_BTHO.
  by_head: ByHead = on_all_heads
  # Of norms over all heads together, which devices may share. None: all heads
  # are here, and such a norm is as any other.
  heads_mean_square: HeadsMeanSquare | None = None
  # Whether the backward pass computes the activation of an MLP again from its
  # input: a pass over memory costs an accelerator more than a tanh.
  recomputes_activation: bool = False
  apply_experts: ApplyExperts = dispatch.apply_experts
  # Groups of devices that share the experts: the kernels of a device are those
  # of E / groups experts, each of `groups` times the width of the config.
  expert_groups: int = 1
  run_layers: RunLayers | None = None  # None: one layer after the other
  # Whether the program contains each layer of a stack (`scan_layers`)
  # separately, not a loop over them. In a training pass only.
  is_unrolled: bool = False
