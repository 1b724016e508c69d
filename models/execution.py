"""Execution: how a model is computed, which never changes what it computes.

`ModelConfig` says which function a parameter tree is and travels with the
weights; an `Execution` belongs to one run on one set of devices. Its functions
are ports: the model calls them with whole arrays and knows nothing of devices;
`parallel/` makes the ones that spread the work over a mesh, and whoever wires a
run together hands them in. The defaults compute everything in place.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from models import cross_entropy
from models.attention import cached, dense
from models.linear import plain
from models.moe import dispatch

# What the backward pass finds stored, besides what enters each layer:
# none: everything; minimal: the results of the layers' matrix products;
# full: nothing; offload: nothing, and what enters waits in host memory.
REMAT = ('none', 'minimal', 'full', 'offload')

# (q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT, dropout, form) -> out_BTHC:
# causal, form a `models.attention.form.Form`.
Attend = Callable[..., jax.Array]
# (q_BTHC, cache, positions_BT, form) -> out_BTHC, over one layer's cache.
AttendCached = Callable[..., jax.Array]
# (hidden_BTD, head_VD, targets_BT, weights_BT, form) -> sums.
WeightedNll = Callable[..., cross_entropy.LossSums]
# (x[..., I], w_IO, bias_O | None, dtype) -> y[..., O]
Linear = Callable[..., Any]
# (hidden[..., D], head_VD, dtype) -> float32 logits[..., V]
Unembed = Callable[..., jax.Array]
# (function, x[..., I]) -> function(x), which treats every [I] by itself.
ByRow = Callable[..., Any]
# (x_BTD, ids_BTA, gates_BTA, kernels, dtype) -> y_BTD, see
# models/moe/dispatch.py.
ApplyExperts = Callable[..., jax.Array]
# (apply_layer, stacked_params, x_BTD, shared, key) -> (x_BTD, sums), where
# apply_layer(layer_params, x_BTD, shared, key) -> (x_BTD, sums): of each leaf
# of `shared`, and of x, the first axis is the batch; sums are added up.
RunLayers = Callable[..., tuple[jax.Array, Any]]


def at_once(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
  """Applies a function of rows to all of them together."""
  return function(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a pass is computed.

  Hashable, as linen modules are. Passes with a cache use `attend_cached` in
  place of `attend`, and neither `weighted_nll` nor `run_layers`.
  """

  remat: str = 'none'  # one of REMAT
  attend: Attend = dense.attend
  attend_cached: AttendCached = cached.attend
  weighted_nll: WeightedNll = cross_entropy.chunked_nll
  linear: Linear = plain.linear
  exact_linear: Linear = plain.exact_linear  # of routers
  unembed: Unembed = plain.unembed
  by_row: ByRow = at_once  # norms and routing: what adds up within a row
  apply_experts: ApplyExperts = dispatch.apply_experts
  run_layers: RunLayers | None = None  # None: one after the other
