"""Small transformers, trained on rows that are drawn as they are needed.

The model, the optimizer, the objective and the train step are the same as in
every run; only the rows come from a function of a random generator in place of
files. All steps between two looks at the model are one program, since a step of
a tiny model takes less time than a call from Python.
"""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import adapter_config, model_config, transformer
from storage import atomic
from studies.papers import port
from training import (
  adapters as adapters_lib,
  state as state_lib,
  step as step_lib,
)
from training.objectives import next_token
from training.optimizer import chain, update_rules

# From a generator to ids [B, T] and whether each is trained, bool [B, T]. The
# first id of a row is no target.
Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """The training of one model."""

  model: model_config.ModelConfig
  optimizer: chain.OptimizerConfig
  num_steps: int
  look_every: int  # steps; divides num_steps
  # With a rank, adapters are trained beside the weights of `start`.
  adapter: adapter_config.AdapterConfig = dataclasses.field(
    default_factory=adapter_config.AdapterConfig
  )

  @property
  def digest(self) -> str:
    """Returns a short digest, which separates results of different recipes."""
    fields = json.dumps(dataclasses.asdict(self), sort_keys=True, default=repr)
    return hashlib.sha256(fields.encode('utf-8')).hexdigest()[:12]


class Trainer:
  """The compiled programs of a recipe."""

  def __init__(self, recipe: Recipe):
    """Compiles nothing yet.

    Raises:
      ValueError: the recipe cannot be trained.
    """
    recipe.model.validate()
    recipe.optimizer.validate(recipe.num_steps)
    recipe.adapter.validate()
    if recipe.num_steps % recipe.look_every:
      raise ValueError(
        f'look_every: got {recipe.look_every}, expected a divisor of'
        f' num_steps = {recipe.num_steps}'
      )
    self._recipe = recipe
    self._model = transformer.Transformer(recipe.model)
    self._optimizer = chain.make_optimizer(
      recipe.optimizer,
      recipe.num_steps,
      recipe.model,
      jax.eval_shape(
        self._first,
        jax.random.key(0),
        state_lib.abstract_params(self._model),
      ),
    )
    self._joined = adapters_lib.joined(recipe.adapter)
    train_step = step_lib.make_train_step(
      self._model, next_token.NextToken(), self._optimizer, joined=self._joined
    )
    self._steps = jax.jit(
      lambda state, batches: jax.lax.scan(train_step, state, batches)[0],
      donate_argnums=0,
    )
    self._init_new = jax.jit(
      lambda key: state_lib.init(self._model, self._optimizer, key)
    )
    self._seen = jax.jit(self._seen_by)
    self._logits = jax.jit(
      lambda params, ids: self._model.apply(params, ids)[0]
    )

  def _first(self, key: jax.Array, start: Any) -> Any:
    """Returns the trained variables before the first step."""
    if not self._recipe.adapter.rank:
      return start
    return adapters_lib.first(self._recipe.adapter, key, start)

  def _init(self, key: jax.Array, start: Any) -> state_lib.TrainState:
    if start is None:
      if self._recipe.adapter.rank:
        raise ValueError(
          'start: got None with adapters, expected the weights beside them'
        )
      return self._init_new(key)
    # The steps donate their state, and `start` stays the caller's.
    start = jax.tree.map(jnp.copy, start)
    state = state_lib.init_with(self._optimizer, key, self._first(key, start))
    if not self._recipe.adapter.rank:
      return state
    return dataclasses.replace(state, frozen_params={adapters_lib.BASE: start})

  def run(
    self, seed: int, draw: Draw, start: Any = None
  ) -> Iterator[tuple[int, Any]]:
    """Trains a model; yields the step and the model's variables, from step 0.

    The variables are valid until the next step is asked for.

    Args:
      seed: seed of the first weights and of the rows.
      draw: draws the rows of a batch.
      start: variables to begin with; None: new ones.
    """
    recipe = self._recipe
    rng = np.random.default_rng([seed, 1])
    state = self._init(jax.random.key(seed), start)
    yield 0, self._joined(state.params, state.frozen_params)
    for step in range(0, recipe.num_steps, recipe.look_every):
      drawn = [batch(*draw(rng)) for _ in range(recipe.look_every)]
      batches = jax.tree.map(lambda *arrays: np.stack(arrays), *drawn)
      state = self._steps(state, batches)
      variables = self._joined(state.params, state.frozen_params)
      yield step + recipe.look_every, variables

  def last(self, seed: int, draw: Draw, start: Any = None) -> Any:
    """Trains a model; returns its variables after the last step."""
    *_, (_, variables) = self.run(seed, draw, start)
    return variables

  def seen(
    self, params: Any, ids_BT: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns -log p of each id but the first, and whether it was likeliest.

    In nats. Both are [B, T - 1]. A greedy continuation is right if and only if
    each of its ids is the likeliest one behind the right ids before it.
    """
    nll, is_right = self._seen(params, ids_BT)
    return np.asarray(nll), np.asarray(is_right)

  def logits(self, params: Any, ids_BT: np.ndarray) -> np.ndarray:
    """Returns the logits of the id after each, [B, T, V]."""
    return np.asarray(self._logits(params, ids_BT))

  def _seen_by(self, params, ids_BT):
    logits_BTV, _ = self._model.apply(params, ids_BT[:, :-1])
    targets_BT = ids_BT[:, 1:]
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    nll_BT = -jnp.take_along_axis(
      logprobs_BTV, targets_BT[..., None], axis=-1
    ).squeeze(-1)
    return nll_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT


def batch(
  ids_BT: np.ndarray, is_trained_BT: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns a batch of rows that each hold one document."""
  shape = len(ids_BT), ids_BT.shape[1] - 1
  return {
    'tokens': ids_BT[:, :-1].astype(np.int32),
    'targets': ids_BT[:, 1:].astype(np.int32),
    'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    'segment_ids': np.ones(shape, np.int32),
    'weights': is_trained_BT[:, 1:].astype(np.float32),
  }


def gpt(
  width: int,
  vocab_size: int,
  length: int,
  *,
  num_layers: int = 2,
  num_heads: int = 2,
  tie_embeddings: bool = False,
) -> model_config.ModelConfig:
  """Returns layers of GPT with rotary positions, for rows of `length` ids."""
  return model_config.ModelConfig(
    vocab_size=vocab_size,
    num_layers=num_layers,
    model_width=width,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_width=width // num_heads,
    mlp='gelu',
    mlp_width=4 * width,
    max_length=length,
    tie_embeddings=tie_embeddings,
    scan_layers=False,
  )


def adam(
  peak_lr: float, *, decay: float = 0.0, beta2: float = 0.99
) -> chain.OptimizerConfig:
  """Returns AdamW with a constant rate behind a short warm-up."""
  return chain.OptimizerConfig(
    rule=update_rules.AdamW(beta1=0.9, beta2=beta2),
    peak_lr=peak_lr,
    schedule='constant',
    warmup_steps=50,
    weight_decay=decay,
    weight_decay_mask='all',
  )


def kept(
  setting: port.Setting,
  recipe: Recipe,
  name: str,
  seed: int,
  measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
  """Returns the numbers of a run, from an earlier start if they are there."""
  setting.workdir.mkdir(parents=True, exist_ok=True)
  path = setting.workdir / f'{name}_{seed}_{recipe.digest}.json'
  if path.exists():
    return json.loads(path.read_text('utf-8'))
  found = measure()
  atomic.write_text(path, json.dumps(found))
  return found
