"""The sampler of on-policy training: the engine that serves.

    sampler = EngineSampler(config, tokenizer=..., dtype=..., ...)
    sampler.update(params, version=0)
    samples = sampler.sample(asks)

`evals/sampling.py` has its contract. New weights are copied into the buffers of
the old ones, and the prefix cache is emptied. A completion has one version of
the weights: they change only while no sequence runs.
"""

from collections.abc import Sequence
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals import judges, sampling
from inference import rewards
from inference.engine import device_state, engine as engine_lib, engine_config
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from models import model_config as model_config_lib
from text import tokenizer as tokenizer_lib

_MODEL = 'params'
# The most sequences that run at once: more would only take memory of the KV
# cache.
_MOST_SEQUENCES = 256


class EngineSampler:
  """Samples with an engine of its own, on one device or several."""

  def __init__(
    self,
    config: model_config_lib.ModelConfig,
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    dtype: str,
    max_length: int,
    max_sequences: int,
    numerics: str = 'fast',
    devices: Sequence[jax.Device] = (),
  ):
    """Allocates nothing: the engine is made for the first weights.

    Args:
      config: config of the model.
      tokenizer: tokenizer of the model.
      dtype: dtype of the computation.
      max_length: tokens of the longest prompt with its completion.
      max_sequences: the most completions that are asked for at once.
      numerics: fast | invariant, see `EngineConfig.numerics`.
      devices: devices that share the model of the engine; none: the first one
        of this process.
    """
    self._config, self._tokenizer, self._dtype = config, tokenizer, dtype
    at_once = min(max_sequences, _MOST_SEQUENCES)
    self._engine_config = engine_config.EngineConfig(
      max_sequences=at_once,
      max_length=min(max_length, config.max_length),
      # Few programs: batches of rollouts are large until their last answers.
      decode_shapes=tuple(sorted({max(at_once // 8, 1), at_once})),
      chunk_tokens=32,
      max_waiting=max(1024, 2 * max_sequences),
      stream_seconds=0.0,
      numerics=numerics,
      tensor=max(len(devices), 1),
    )
    self._devices = tuple(devices) or tuple(jax.devices()[:1])
    self.engine: engine_lib.Engine | None = None
    self._copy_into: Any = None  # a compiled function, see `_copier`
    self._version = -1
    self._may_run = threading.Event()
    self._may_run.set()
    self._stepping = threading.Lock()

  def update(self, params: Any, version: int) -> None:
    """Copies new weights in; see `sampling.Sampler.update`.

    Raises:
      ValueError: completions are unfinished, or the weights are of another
        model.
    """
    own = {_MODEL: params[_MODEL]}
    with self._stepping:
      if self.engine is None:
        self.engine = self._made(_copied(own, self._devices[0]))
        self._copy_into = _copier(self.engine)
      elif len(self._devices) > 1:
        self.engine.set_params(own, str(version))
      else:
        _take(self.engine, own, self._copy_into, str(version))
      self._version = version

  def sample(self, asks: Sequence[sampling.Ask]) -> list[list[sampling.Sample]]:
    """Returns the completions; see `sampling.Sampler.sample`."""
    if self.engine is None:
      raise ValueError(
        'sampler: got no weights, expected some; call update first'
      )
    requests = [_request(ask) for ask in asks]
    found: list[list[Any]] = [[None] * ask.num_samples for ask in asks]
    updates = self.engine.answer(requests)
    while True:
      self._may_run.wait()
      with self._stepping:
        which, update = next(updates, (None, None))
      if which is None or update is None:
        return found
      if update.completion:
        update.completion.check()
        found[which][update.index] = self._sample(update.completion)

  def pause(self) -> None:
    """Stops before the next step; see `sampling.Sampler.pause`."""
    self._may_run.clear()
    with self._stepping:
      if self.engine is not None:
        jax.block_until_ready(self.engine._state)

  def resume(self) -> None:
    """Continues after `pause`."""
    self._may_run.set()

  def open_scorer(self, path: str) -> judges.ScoreFn:
    """Loads a frozen reward model; returns the function that scores answers."""
    return rewards.open_scorer(path)

  def close(self) -> None:
    """Frees weights and KV cache."""
    if self.engine is not None:
      self.engine.release()
      self.engine = None

  def _made(self, params: device_state.Params) -> engine_lib.Engine:
    return engine_lib.Engine(
      self._config,
      params,
      tokenizer=self._tokenizer,
      weights_digest='0',
      dtype=jnp.dtype(self._dtype),
      config=self._engine_config,
      compile_all=False,
      devices=self._devices,
    )

  def _sample(self, completion: requests_lib.Completion) -> sampling.Sample:
    ids = tuple(completion.token_ids)
    logprobs = [each.chosen for each in completion.logprobs or ()]
    return sampling.Sample(
      ids=ids,
      text=completion.text,
      logprobs=np.asarray(logprobs, np.float32),
      versions=np.full(len(ids), self._version, np.int32),
      is_truncated=completion.finish_reason == 'length',
    )


def _request(ask: sampling.Ask) -> requests_lib.Request:
  return requests_lib.Request(
    prompt_ids=ask.prompt_ids,
    settings=settings_lib.Settings(
      temperature=ask.temperature,
      max_tokens=ask.max_tokens,
      seed=ask.seed,
      n=ask.num_samples,
      stop_ids=ask.stop_ids,
      stop=ask.stop,
      logprobs=0,
    ),
    scores_drawn=True,
  )


def _copier(engine: engine_lib.Engine) -> Any:
  """Returns fn(weights that are served, new ones) -> a copy of the new ones.

  Donates the first argument: the copy takes its place.
  """

  def copy(old, new):
    laid_out = engine.backend.laid_out(new, engine.model_config)
    return jax.tree.map(
      lambda before, x: jnp.copy(x).astype(before.dtype), old, laid_out
    )

  return jax.jit(copy, donate_argnums=0, keep_unused=True)


def _take(
  engine: engine_lib.Engine,
  params: device_state.Params,
  copy_into: Any,
  digest: str,
) -> None:
  """Copies weights into the buffers of the weights that are served."""
  engine.adapters.check_empty()
  if engine.has_work:
    raise ValueError(
      'weights: got new ones while completions are unfinished, expected none;'
      ' wait for them: a completion has one set of weights'
    )
  params = jax.device_put(params, engine.device)
  laid_out = functools.partial(
    engine.backend.laid_out, model=engine.model_config
  )
  device_state.check_alike(jax.eval_shape(laid_out, params), engine.params)
  engine.params = copy_into(engine.params, params)
  engine.weights_digest = digest
  engine.manager.clear()


def _copied(
  params: device_state.Params, device: jax.Device
) -> device_state.Params:
  """Returns a copy that shares no buffer, on one device."""
  placed = jax.device_put(params, device)
  return jax.tree.map(lambda x: jnp.array(x, copy=True), placed)


def make(model: Any) -> EngineSampler:
  """Returns the sampler of a run, a `training.rollouts.sampler.ModelOfRun`."""
  return EngineSampler(
    model.config,
    tokenizer=model.tokenizer,
    dtype=model.compute_dtype,
    max_length=model.max_length,
    max_sequences=model.max_sequences,
    numerics=model.numerics,
    devices=model.devices,
  )
