"""The contract between objectives and the train step.

An objective is a frozen dataclass: its fields are its hyper-parameters, and it
is called with parameters, a batch and a model. It returns *sums* over its
batch, never means. The step adds the sums of micro-batches and devices, and
divides once, by `sums['weight']`; so the loss and its gradient do not depend on
how a batch was cut up. A loss that needs a sum over the whole batch in its
formula, as the denominator of one of its terms, asks for it with `totals`.

A new objective is one file in this folder. The loop and the step stay the same.
"""

import abc
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import axes, model_config as model_config_lib, transformer
from models.layers import cross_entropy

Batch = Mapping[str, jax.Array]


class Mean(NamedTuple):
  """A sum with its own denominator; reported as 0 if the denominator is 0."""

  total: jax.Array
  weight: jax.Array  # its denominator, a sum too


class Share(Mean):
  """A `Mean` of zeros and ones; evaluation reports its standard error."""


Sums = dict[str, Any]  # arrays, and `Mean` of arrays
# Collections of a params tree: the transformer's own, the objective's heads,
# and adapters beside frozen weights of the transformer.
MODEL, HEADS, ADAPTERS = 'params', axes.HEADS, axes.ADAPTERS


class ArraySpec(NamedTuple):
  """Shape and dtype of one array of a batch."""

  axes: str  # letters of models/axes.py; B rows, T tokens per row
  dtype: Any
  width: int = 0  # values of each token, on a further axis; 0: one, without it


_TOKENS = ArraySpec('BT', jnp.int32)
# The arrays that data/batches.py makes.
TOKEN_ROWS: Mapping[str, ArraySpec] = {
  'tokens': _TOKENS,
  'targets': _TOKENS,  # the token after each token
  'positions': _TOKENS,  # in the document
  'segment_ids': _TOKENS,  # number of the document in the row; 0: padding
  'weights': ArraySpec('BT', jnp.float32),  # of each target; 0: not trained on
}


class Hidden(NamedTuple):
  """The output of a transformer's layers."""

  states_BTD: jax.Array  # final hidden states, the input of the head
  routing: Any  # `models.moe.layer.routing_sums` [N, ...]; None: a dense model


@dataclasses.dataclass(frozen=True)
class Model:
  """A transformer as objectives see it. All methods are pure."""

  module: transformer.Transformer
  dropout_key: jax.Array | None = None  # None: no dropout

  def hidden(
    self,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> Hidden:
    """Returns the final hidden states, and the routing of experts."""
    states_BTD, _, routing = self._apply(
      transformer.Transformer.hidden_and_routing,
      params,
      tokens_BT,
      positions_BT,
      None,
      segment_ids_BT,
    )
    return Hidden(states_BTD, routing)

  def weighted_nll(
    self,
    params: Any,
    states_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss_weight: float = 0.0,
  ) -> cross_entropy.LossSums:
    """Returns the summed loss of the targets, in nats, without logits."""
    return self._apply(
      transformer.Transformer.weighted_nll,
      params,
      states_BTD,
      targets_BT,
      weights_BT,
      z_loss_weight,
    )

  def logits(self, params: Any, states: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D]."""
    return self._apply(transformer.Transformer.unembed, params, states)

  def embeddings(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Returns the rows of the embedding of tokens, [B, T, D]."""
    return self._apply(transformer.Transformer.token_rows, params, tokens_BT)

  def head_rows(self, params: Any, num_ids: int) -> jax.Array:
    """Returns the first rows of the unembedding, [num_ids, D]."""
    return self._apply(transformer.Transformer.head_matrix, params)[:num_ids]

  def token_logprobs(
    self,
    params: Any,
    states_BTD: jax.Array,
    targets_BT: jax.Array,
    temperature: float = 1.0,
  ) -> jax.Array:
    """Returns log p(target) of every token, float32 [B, T].

    Holds the logits of one chunk of time only, in the backward pass too.

    Args:
      temperature: divides the logits.
    """
    return self.token_logprobs_and_entropy(
      params, states_BTD, targets_BT, temperature
    )[0]

  def token_logprobs_and_entropy(
    self,
    params: Any,
    states_BTD: jax.Array,
    targets_BT: jax.Array,
    temperature: float = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns `token_logprobs`, and the entropy of each next token, [B, T].

    The entropy is in nats, and has no gradient.
    """

    # Without remat, the backward pass would keep the logits of all chunks.
    @jax.checkpoint
    def of_chunk(states_BtD, targets_Bt):
      logprobs_BtV = self.module.execution.log_softmax(
        self.logits(params, states_BtD),
        self.module.config.spare_ids,
        temperature,
      )
      own_Bt1 = jnp.take_along_axis(
        logprobs_BtV, targets_Bt[:, :, None], axis=-1
      )
      known_BtV = jax.lax.stop_gradient(logprobs_BtV)
      # Ids without a token have a probability of 0 and a finite logarithm.
      entropy_Bt = -jnp.sum(jnp.exp(known_BtV) * known_BtV, axis=-1)
      return own_Bt1[:, :, 0], entropy_Bt

    return self.map_chunks(of_chunk, states_BTD, targets_BT)

  def map_chunks(
    self,
    fn: Callable[[Any, jax.Array], Any],
    states_BTD: Any,
    targets_BT: jax.Array,
  ) -> Any:
    """Returns `fn` of all chunks of time, joined; each array is [B, T, ...].

    Args:
      fn: function of hidden states and of targets.
      states_BTD: an array, or a tree of them.
      targets_BT: targets of the positions of the states.

    A chunk is at most as long as `models.layers.cross_entropy` allows logits.
    """
    batch, time = targets_BT.shape
    vocab_size = self.module.config.vocab_size
    chunks = cross_entropy.num_chunks(batch, time, vocab_size)

    def split(x):
      x = x.reshape((batch, chunks, time // chunks, *x.shape[2:]))
      return x.swapaxes(0, 1)

    parts = jax.tree.map(split, (states_BTD, targets_BT))
    found = jax.lax.map(lambda part: fn(*part), parts)
    return jax.tree.map(
      lambda x: x.swapaxes(0, 1).reshape((batch, time, *x.shape[3:])), found
    )

  def _apply(self, method: Callable, params: Any, *args: Any) -> Any:
    rngs = None if self.dropout_key is None else {'dropout': self.dropout_key}
    variables = {k: params[k] for k in (MODEL, ADAPTERS) if k in params}
    return self.module.apply(variables, *args, method=method, rngs=rngs)


class FrozenModel(NamedTuple):
  """Another model that an objective needs, and its weights: no gradient."""

  model: Model
  params: Any


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """The place of another model's weights."""

  path: str  # frozen directory; '': config.init_from


class TopTokens(NamedTuple):
  """The likeliest next tokens that a frozen model gives each place.

  The last of the k + 1 log-probabilities is that of all other tokens together.
  """

  source: ModelSource
  count: int  # k
  temperature: float = 1.0  # divides the logits

  def specs(self, name: str) -> dict[str, ArraySpec]:
    """Returns the arrays of a batch, by name."""
    return {
      f'{name}_ids': ArraySpec('BT', jnp.int32, self.count),
      f'{name}_logprobs': ArraySpec('BT', jnp.float32, self.count + 1),
    }


class Objective(abc.ABC):
  """The base class of objectives: their contract, and its defaults."""

  @abc.abstractmethod
  def __call__(
    self, params: Any, batch: Batch, model: Model, **others: FrozenModel
  ) -> tuple[jax.Array, Sums]:
    """Returns the summed loss, and the sums that the step reports.

    Args:
      params: the trained parameters. `params['params']` are the variables of
        the transformer, `params['heads']` is the result of `init_heads`.
      batch: the arrays of `batch_spec`, or some of their rows.
      model: the trained transformer.
      **others: the models of `models_needed`, each by its name; and `totals`,
        if the method of that name returns sums.

    Returns:
      The loss, and sums with at least `weight`: the loss, the gradient and all
      scalars are divided by it. If the loss has terms beyond a prediction loss,
      `nll` is that prediction loss. A `Mean` has its own denominator. Arrays
      [..., shares] are counts, of which evenness is reported. `tokens` is the
      number of trained targets, where `weight` counts something else.
    """

  def totals(
    self, params: Any, batch: Batch, model: Model, **others: FrozenModel
  ) -> Sums | None:
    """Returns sums that the loss of every part of a batch needs; None: none.

    The step adds them up over micro-batches and devices before it computes any
    loss, and passes the whole to `__call__` as `totals`. No gradient goes
    through them, and there is no dropout.

    Args:
      params: as for `__call__`.
      batch: some rows of the whole batch.
      model: as for `__call__`.
      **others: the models of `models_needed`.
    """
    del params, batch, model, others

  def annotate(
    self, params: Any, batch: Batch, model: Model, **others: FrozenModel
  ) -> Mapping[str, jax.Array]:
    """Returns the arrays `annotated`, float32 [B, T] each; no gradient.

    For batches that the policy sampled. The arrays hold values of the policy as
    it was before a batch's first step, or of a frozen model on the sampled
    text. It is called once per sampled batch, with some rows at a time, and
    without dropout.

    Args:
      params: as for `__call__`.
      batch: the arrays of `batch_spec`, without the `annotated` ones.
      model: as for `__call__`.
      **others: the models of `models_needed`.
    """
    del params, batch, model, others
    return {}

  def derived(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the metrics of a step, with figures that are not means of sums.

    Args:
      metrics: each sum of `__call__` over its denominator.
    """
    return metrics

  def validate(self) -> None:
    """Raises ValueError for hyper-parameters that no run can use."""
    return

  @property
  def frozen_sources(self) -> Mapping[str, ModelSource]:
    """The frozen models that a run reads, by name."""
    return {
      **self.models_needed,
      **self.logprobs_needed,
      **{name: top.source for name, top in self.top_tokens_needed.items()},
    }

  def check_start(self, init_from: str) -> None:
    """Raises ValueError if no run can train from these weights.

    Args:
      init_from: frozen directory of the first weights; '': random weights.
    """
    for name, source in self.frozen_sources.items():
      if not (source.path or init_from):
        raise ValueError(
          f'config.objective: got no frozen model for {name}, expected the'
          " reference's frozen directory; set config.init_from, or"
          ' config.objective.reference'
        )

  def batch_spec(self) -> Mapping[str, ArraySpec]:
    """Returns the arrays that a batch holds, by name."""
    return TOKEN_ROWS

  @property
  def annotated(self) -> tuple[str, ...]:
    """The arrays of `batch_spec` that `annotate` makes; (): it is not called.

    Such arrays belong to batches that the policy samples.
    """
    return ()

  @property
  def examples(self) -> tuple[str, ...]:
    """The values of `data.examples` that make its batches."""
    return 'text', 'chat'

  @property
  def sampled_at(self) -> float | None:
    """The temperature at which sampled batches have to be drawn; None: any."""
    return None

  @property
  def predicts_text(self) -> bool:
    """Whether the loss is the loss of the targets, which has bits per byte."""
    return True

  @property
  def trains_heads_alone(self) -> bool:
    """Whether the weights of `config.init_from` are frozen, below the heads."""
    return False

  @property
  def logprobs_needed(self) -> Mapping[str, ModelSource]:
    """Log-probabilities of the targets under frozen models, by array name.

    Each is an array of `batch_spec`, float32 [B, T]. They are computed once,
    before the first step, and kept on disk:
    training/frozen_inputs/reference.py.
    """
    return {}

  @property
  def top_tokens_needed(self) -> Mapping[str, TopTokens]:
    """The likeliest next tokens under frozen models, by name.

    Each is two arrays of `batch_spec`: {name}_ids, int32 [B, T, k], and
    {name}_logprobs, float32 [B, T, k + 1]. Computed as `logprobs_needed`.
    """
    return {}

  @property
  def models_needed(self) -> Mapping[str, ModelSource]:
    """The other models that are passed to `__call__`, by name.

    The learner reads each from its frozen directory, places it like the model
    and never updates it.
    """
    return {}

  def init_heads(
    self, config: model_config_lib.ModelConfig, key: jax.Array
  ) -> Any:
    """Returns the parameters that are trained beside the model's; None: none.

    Each is named {head: {'kernel' [width, outputs], 'bias' [outputs]}}, see
    models/axes.py. They are checkpointed. The head `reward` is frozen with the
    transformer (`models.layers.reward_head`), the head `draft` in a directory
    of its own (`models.layers.draft_head`); other heads are for training only.

    Args:
      config: config of the transformer.
      key: PRNG key of their first values.
    """
    del config, key
