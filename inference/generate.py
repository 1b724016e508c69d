"""The generator: prompts to completions with one frozen model.

    generator = generate.load(directory, adapters={'sql': sql_directory})
    for piece in generator.stream('def add(', settings): ...
    sql = generator.adapted('sql')  # the same engine, with an adapter

A text prompt starts with the tokenizer's BOS if the training documents did. The
prompt '' is BOS alone. A prompt of token ids is used verbatim. A sequence ends
at EOS, at a stop string or id, or at its length. Nothing is truncated silently.

Several streams may be open at once, see `Engine.answer`.
"""

from collections import abc
import copy
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checks import expect
from frozen import adapters as frozen_adapters, format as frozen_format
from inference import adapters as adapters_lib, drafts
from inference.engine import device_state, engine as engine_lib, engine_config
from inference.engine.processes import leader as leader_lib
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import axes, layout
from models.linear import products as products_lib
from text import tokenizer as tokenizer_lib

Prompt = str | abc.Sequence[int]
_MODEL = 'params'  # the collection that an engine computes with


class Generator:
  """Answers prompts with one frozen model; one thread owns it."""

  def __init__(
    self,
    frozen: frozen_format.Opened,
    config: engine_config.EngineConfig = engine_config.EngineConfig(),
    *,
    compile_all: bool = True,
    adapters: abc.Mapping[str, frozen_adapters.Adapter] | None = None,
    engine: abc.Callable[[tokenizer_lib.Tokenizer], Any] | None = None,
    leader: leader_lib.Leader | None = None,
  ):
    """Makes the engine, and loads the adapters.

    Args:
      frozen: the model.
      config: the layout of the engine.
      compile_all: False leaves programs to `engine.compile_rest`.
      adapters: adapters of the model, by name.
      engine: returns an engine in another process, for a tokenizer; see
        `server.replicas.remote_engine`. None: makes one here.
      leader: of an engine over several processes, see `Engine`.
    """
    self.frozen = frozen
    self.heads = {}  # of a reward model, once the weights are read
    # The adapter of this generator, None for the base; and all, by name.
    self.adapter: frozen_adapters.Adapter | None = None
    self._adapters = dict(adapters or {})
    config = config.holding(adapters_lib.ranks(self._adapters.values()))
    self.tokenizer = tokenizer_lib.load(frozen.tokenizer_dir)
    self.defaults = settings_lib.recommended(frozen.generation)
    if self.tokenizer.vocab_size > frozen.config.vocab_size:
      raise ValueError(
        f'{frozen.tokenizer_dir}: got a tokenizer of'
        f' {self.tokenizer.vocab_size} ids, expected at most the'
        f' {frozen.config.vocab_size} that the model embeds; freeze again with'
        ' the tokenizer of the training run'
      )
    self.engine: engine_lib.Engine
    if engine is not None:
      self.engine = engine(self.tokenizer)
      return
    self.engine = engine_lib.Engine(
      frozen.config,
      device_state.Unread({_MODEL: frozen.shapes[_MODEL]}, self._read),
      tokenizer=self.tokenizer,
      weights_digest=frozen.manifest.weights_digest,
      dtype=jnp.dtype(frozen.manifest.dtype),
      config=config,
      compile_all=compile_all,
      draft=drafts.read(config, frozen),
      leader=leader,
    )
    for adapter in self._adapters.values():
      self.engine.adapters.load(adapter.manifest.adapter_digest, adapter.tree)

  def adapted(self, name: str) -> 'Generator':
    """Returns the generator of an adapter, which shares the engine.

    Raises:
      ValueError: no adapter has the name.
    """
    if name not in self._adapters:
      names = ', '.join(map(expect.shown, self._adapters)) or 'none'
      raise ValueError(
        f'adapter: got {expect.shown(name)}, expected one of the names of'
        f' --adapters: {names}'
      )
    return self.beside(self._adapters[name])

  def beside(self, adapter: frozen_adapters.Adapter) -> 'Generator':
    """Returns a generator that answers with an adapter of the engine.

    The template and the settings of the adapter take the place of the base's.
    """
    made = copy.copy(self)
    made.adapter = adapter
    made.frozen = dataclasses.replace(
      self.frozen,
      chat_template=adapter.chat_template or self.frozen.chat_template,
      generation=adapter.generation or self.frozen.generation,
    )
    made.defaults = settings_lib.recommended(made.frozen.generation)
    return made

  @property
  def adapter_digest(self) -> str:
    """The digest of its adapter, '' for the base."""
    return self.adapter.manifest.adapter_digest if self.adapter else ''

  def load_adapter(self, name: str, directory: str | os.PathLike) -> None:
    """Loads an adapter under a name; it replaces one of that name.

    Raises:
      FileNotFoundError: the directory has no adapter.
      ValueError: the adapter belongs to another base, or the engine has no
        place for it.
    """
    (new,) = adapters_lib.read(
      {name: os.fspath(directory)}, self.frozen
    ).values()
    self.engine.adapters.fitted(new.tree)  # before the other one has gone
    if name in self._adapters:
      self.unload_adapter(name)
    self.engine.adapters.load(new.manifest.adapter_digest, new.tree)
    self._adapters[name] = new

  def unload_adapter(self, name: str) -> None:
    """Unloads the adapter of a name.

    Raises:
      ValueError: no adapter has the name, or it answers a request.
    """
    digest = self.adapted(name).adapter_digest
    self.engine.adapters.unload(digest)
    del self._adapters[name]

  def _read(self, convert):
    params = self.frozen.read_params(convert)
    self.heads = params.get(axes.HEADS, {})
    return {_MODEL: params[_MODEL]}

  @functools.cached_property
  def most_characters(self) -> int:
    """Characters of the longest text that can fit into the context.

    No token has more characters than the longest token has bytes. A tokenizer
    that changes text, so that one token stands for more, is held to it too.
    """
    longest = int(self.tokenizer.num_bytes_V().max(initial=1))
    return self.engine.context * longest

  def check_length(self, prompt: Prompt) -> None:
    """Refuses a prompt that cannot fit, without looking at its content.

    Raises:
      TooLong: the prompt has more characters, or ids, than can fit.
    """
    context = self.engine.context
    is_text = isinstance(prompt, str)
    most = self.most_characters if is_text else context
    if len(prompt) > most:
      unit = 'characters' if is_text else 'token ids'
      raise requests.TooLong(
        f'prompt: got {len(prompt)} {unit}, expected at most {most}, which is'
        f' more than fits into the context of this model ({context} tokens);'
        ' shorten the prompt'
      )

  def weights_digest(self) -> str:
    """Returns the digest of the weights that the engine computes with now."""
    params = self.engine.whole_params()
    if self.frozen.config.scan_layers:
      params = jax.tree.map(np.asarray, params)
      params, _ = layout.stack(params, self.engine.model_config)
    if self.heads:
      params = {**params, axes.HEADS: self.heads}
    return frozen_format.weights_digest(params)

  def memory_text(self) -> str:
    """Returns the sizes of the KV cache as one line."""
    engine = self.engine
    pages = engine.manager.tables.allocator.num_usable
    tokens = pages * engine.page_tokens
    text = (
      f'KV cache {pages * engine.page_bytes / 2**20:,.0f} MiB: {pages:,} pages'
      f' of {engine.page_tokens:,} tokens; {engine.config.max_sequences}'
      f' sequences run at once, of at most {min(engine.context, tokens + 1):,}'
      f' tokens each and {tokens:,} together'
    )
    if others := engine.config.prefill_engines:
      text += f'; {others} more for prompts, with weights and pages each'
    if engine.draft is None:
      return text
    own = pages * engine.page_tokens * engine.backend.beside_bytes
    return (
      f'{text}; draft {engine.config.speculation}'
      f' {engine.draft.num_bytes / 2**20:,.0f} MiB, and'
      f' {own / 2**20:,.0f} MiB of the KV cache'
    )

  def products_text(self) -> str:
    """Returns how weights are multiplied, '' where there is one way alone."""
    products = self.engine.backend.products
    return '' if products == products_lib.PLAIN else products

  def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
    """Returns the ids of a prompt: text as in training, ids verbatim."""
    if not isinstance(prompt, str):
      return tuple(prompt)
    # Encoding a batch, the library lets other threads run meanwhile.
    (ids,) = self.tokenizer.encode_batch([prompt])
    ids = ids.tolist()
    # An empty prompt needs a first token, even if training had no BOS.
    if self.frozen.manifest.has_bos or not ids:
      ids = [self.tokenizer.bos_id, *ids]
    return tuple(ids)

  def warning(self, prompt: str) -> str:
    """Returns the warning about special tokens in a text prompt, or ''."""
    token = tokenizer_lib.special_token_in(self.tokenizer, prompt)
    if not token:
      return ''
    return (
      f'prompt: got the special token {token!r} as text, expected a prompt'
      ' without: it stays text, so that no text forges a turn; for a chat, use'
      ' serve.py --chat, or --system with --prompt; over HTTP, send token ids.'
    )

  def settings_for(self, prompt: Prompt, **chosen) -> settings_lib.Settings:
    """Returns the recommended settings of the model, with changes.

    A recommended max_tokens is lowered to the room after the prompt; a chosen
    max_tokens is not.

    Args:
      **chosen: fields of `Settings`; None keeps the recommendation.

    Raises:
      SettingError: a value is out of range, or contradicts another.
    """
    chosen = {
      name: value for name, value in chosen.items() if value is not None
    }
    room = self.engine.context - len(self.prompt_ids(prompt))
    if 'max_tokens' not in chosen and room < (
      self.defaults.max_tokens or math.inf
    ):
      chosen['max_tokens'] = None
    if chosen.get('ignore_eos'):
      # Open models recommend their several EOS ids as stop ids.
      chosen.setdefault('stop_ids', ())
    return dataclasses.replace(self.defaults, **chosen)

  def request(
    self, prompt: Prompt, settings: settings_lib.Settings, **fields
  ) -> requests.Request:
    """Returns a request that the engine has checked.

    Raises:
      ValueError: the request could never be answered.
    """
    return self.engine.checked(
      requests.Request(
        prompt_ids=self.prompt_ids(prompt),
        settings=settings,
        adapter=self.adapter_digest,
        **fields,
      )
    )

  def generate(
    self,
    prompts: abc.Sequence[Prompt],
    settings: settings_lib.Settings | abc.Sequence[settings_lib.Settings],
  ) -> list[requests.Completion]:
    """Returns the n completions of the first prompt, then of the second.

    Raises:
      NotFinite: the model computed numbers that are not finite.
    """
    completions: dict[tuple[int, int], requests.Completion] = {}
    for which, update in self.updates(prompts, settings):
      if update.completion:
        update.completion.check()
        completions[which, update.index] = update.completion
    return [completions[key] for key in sorted(completions)]

  def stream(
    self, prompt: Prompt, settings: settings_lib.Settings
  ) -> abc.Iterator[str | requests.Completion]:
    """Yields pieces of the completion's text, then the completion.

    Raises:
      ValueError: at the call, for a prompt that cannot be answered.
      NotFinite: the model computed numbers that are not finite; the pieces
        before have been yielded.
    """
    if settings.n != 1:
      raise settings_lib.SettingError(
        'n', settings.n, '1 in a stream', 'use `updates` for several'
      )
    return self._pieces(self.updates([prompt], settings))

  def updates(
    self,
    prompts: abc.Sequence[Prompt],
    settings: settings_lib.Settings | abc.Sequence[settings_lib.Settings],
  ) -> abc.Generator[tuple[int, requests.Update]]:
    """Yields updates, each with the index of its prompt; closing it cancels.

    Args:
      prompts: at least one. The engine gets them as its queue has room.

    Raises:
      ValueError: a prompt cannot be answered. It is raised at the call, before
        a server has sent status 200.
    """
    if isinstance(settings, settings_lib.Settings):
      settings = [settings] * len(prompts)
    if not prompts or len(prompts) != len(settings):
      raise ValueError(
        f'prompts: got {len(prompts)} prompts and {len(settings)} settings,'
        ' expected at least one prompt, and as many settings'
      )
    return self.engine.answer(
      [
        requests.Request(
          prompt_ids=self.prompt_ids(prompt),
          settings=wanted,
          adapter=self.adapter_digest,
        )
        for prompt, wanted in zip(prompts, settings, strict=True)
      ]
    )

  def _pieces(self, updates) -> abc.Iterator[str | requests.Completion]:
    for _, update in updates:
      if update.text:
        yield update.text
      if update.completion:
        update.completion.check()
        yield update.completion


def load(
  directory: str | os.PathLike,
  config: engine_config.EngineConfig = engine_config.EngineConfig(),
  *,
  compile_all: bool = True,
  is_for_rewards: bool = False,
  adapters: abc.Mapping[str, str] | None = None,
  leader: leader_lib.Leader | None = None,
) -> Generator:
  """Reads and verifies a frozen directory; returns its generator.

  Args:
    directory: the frozen directory.
    config: the layout of the engine.
    compile_all: False leaves programs to `engine.compile_rest`.
    is_for_rewards: whether a reward model is accepted, too.
    adapters: directories of adapters of the base, by name.
    leader: of an engine over several processes, see `Engine`.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: the directory is damaged, or holds a reward model.
  """
  sharding = None
  if config.tensor > 1:
    # Weights go from the host to the device that holds them.
    host = jax.local_devices(backend='cpu')[0]
    sharding = jax.sharding.SingleDeviceSharding(host)
  frozen = frozen_format.open_directory(directory, sharding=sharding)
  if not is_for_rewards:
    frozen.manifest.check_language_model('model', str(directory))
  found = adapters_lib.read(adapters or {}, frozen)
  try:
    return Generator(
      frozen, config, compile_all=compile_all, adapters=found, leader=leader
    )
  except Exception:
    frozen.check_files()  # its error names the file that is damaged
    raise
