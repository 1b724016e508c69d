"""A model of ours as one of the LM Evaluation Harness, in process.

Needs lm_eval (requirements-eval.txt); nothing imports this file but
`lm_eval_tasks.py`, which is imported once a task of lm_eval is asked for.
What is asked of the model, token by token, is what lm_eval's own `hf` model
asks: the same cut between context and continuation, the same BOS, windows,
truncation and stop strings. So the same weights get the same scores. One thing
is not copied: where some prompts of a batch begin with BOS of their own and
others do not, `hf` treats all of them like the first.

Reference: github.com/EleutherAI/lm-evaluation-harness, version 0.4.13,
`lm_eval/models/huggingface.py`.
"""

from collections.abc import Sequence
import logging
from typing import Any

from lm_eval.api import model as lm_eval_model
from lm_eval.models import utils as lm_eval_utils

from evals import encoding, ports
from evals.tasks import perplexity

_log = logging.getLogger('lm_eval')  # where lm_eval's own warnings go
_MAX_GEN_TOKENS = 256  # of tasks that do not say, as in lm_eval
# Filters that a task may ask for, as transformers names them. Any other
# setting is refused, since the ports would ignore it.
_FILTERS = ('top_k', 'top_p', 'min_p')
# Texts, or None, and the ids of context and continuation.
_Request = tuple[Any, list[int], list[int]]


class LM(lm_eval_model.TemplateLM):
  """Answers lm_eval's requests through the ports.

  Inherits `loglikelihood` and with it how a context and a continuation are
  encoded.
  """

  def __init__(self, model: ports.Model, *, seed: int = 0):
    """Wraps a model.

    Args:
      model: has a logprob_fn, a sample_fn, or both.
      seed: of what is sampled, where a task asks for that.
    """
    super().__init__()
    self._model = model
    self._seed = seed

  @property
  def eot_token_id(self) -> int:
    """Returns the id of the token that ends a document."""
    return self._model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What an empty context is."""
    return self._model.prefix

  @property
  def max_length(self) -> int:
    """Tokens that the model reads at most."""
    return self._model.max_length

  @property
  def max_gen_toks(self) -> int:
    """Of a task that does not say."""
    return _MAX_GEN_TOKENS

  @property
  def tokenizer_name(self) -> str:
    """By which lm_eval keeps requests that were encoded before."""
    tokenizer = self._model.tokenizer
    return str(
      self._model.description.get('tokenizer', type(tokenizer).__name__)
    ).replace('/', '__')

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Returns the ids of a text.

    Args:
      string: the names of special tokens in it are those.
      add_special_tokens: put BOS in front; None: as the model's texts have it,
        and never a second one.
      **kwargs: none.
    """
    if kwargs:
      raise TypeError(f'tok_encode: got {sorted(kwargs)}, expected no more')
    model = self._model
    if add_special_tokens is None:
      return encoding.encode_trusted(model, string)
    ids = (model.encode_prompt or model.tokenizer.encode)(string)
    return encoding.bos(model) + ids if add_special_tokens else ids

  def _loglikelihood_tokens(
    self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs
  ) -> list[tuple[float, bool]]:
    # The progress bar is the caller's: what `logprob_fn` does it tells itself.
    del disable_tqdm, kwargs
    if not requests:
      return []
    pairs = [
      # White space alone is an empty context too; lm_eval's hf gives up.
      encoding.fit(self._model, context or [self._model.prefix], continuation)
      for _, context, continuation in requests
    ]
    for (_, context, continuation), pair in zip(requests, pairs, strict=True):
      if pair.num_dropped:
        _log.warning(
          'Combined length of context (%d) and continuation (%d) exceeds the'
          ' %d tokens that the model reads: %d were cut from the left.',
          len(context),
          len(continuation),
          self.max_length,
          pair.num_dropped,
        )
    scored = self._model.scores()([pair[:2] for pair in pairs])
    answers = [(float(one.logprob), bool(one.is_greedy)) for one in scored]
    for (key, _, _), answer in zip(requests, answers, strict=True):
      if key is not None:
        self.cache_hook.add_partial('loglikelihood', key, answer)
    return answers

  def loglikelihood_rolling(
    self, requests, disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-probability of each text, in windows without overlap."""
    del disable_tqdm
    answers = []
    for (text,) in [request.args for request in requests]:
      ids = self.tok_encode(text)
      found = (
        perplexity.token_logprobs(self._model, ids, self.max_length)
        if ids
        else ()
      )
      answers.append(float(sum(found)))
      self.cache_hook.add_partial('loglikelihood_rolling', (text,), answers[-1])
    return answers

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Returns what the model writes until a stop string of the task.

    A request that comes several times gets as many samples.

    Raises:
      ValueError: the task asks for something that the ports do not have, or
        for more tokens than the model can read.
    """
    del disable_tqdm
    asked = [(prompt, _hashable(kwargs)) for prompt, kwargs in _args(requests)]
    waiting: dict[Any, list[int]] = {}
    for i, key in enumerate(asked):
      waiting.setdefault(key, []).append(i)
    # Prompts that are sampled alike, and as often, in one call.
    calls: dict[Any, list[Any]] = {}
    for key, members in waiting.items():
      calls.setdefault((key[1], len(members)), []).append(key)
    answers = [''] * len(asked)
    for (_, num_samples), keys in calls.items():
      kwargs = requests[waiting[keys[0]][0]].args[1]
      texts = self._generate([key[0] for key in keys], kwargs, num_samples)
      for key, samples in zip(keys, texts, strict=True):
        for i, text in zip(waiting[key], samples, strict=True):
          answers[i] = text
          self.cache_hook.add_partial('generate_until', (key[0], kwargs), text)
    return answers

  def _generate(
    self, prompts: list[str], kwargs: dict[str, Any], num_samples: int
  ) -> list[list[str]]:
    settings = self._settings(kwargs)
    if num_samples > 1 and not settings.temperature:
      samples = self._generate(prompts, kwargs, 1)
      return [texts * num_samples for texts in samples]
    ids = []
    for prompt in prompts:
      pair = encoding.fit_prompt(
        self._model, self.tok_encode(prompt), settings.max_tokens
      )
      if pair.num_dropped:
        _log.warning(
          'Left truncation applied: %d tokens of a prompt were cut, to leave'
          ' room for the %d of the completion.',
          pair.num_dropped,
          settings.max_tokens,
        )
      ids.append(pair.context)
    found = self._model.samples()(ids, settings, num_samples)
    return [
      [
        lm_eval_utils.postprocess_generated_text(
          completion.text, list(settings.stop), None
        )
        for completion in completions
      ]
      for completions in found
    ]

  def _settings(self, kwargs: dict[str, Any]) -> ports.SampleSettings:
    """Returns what a task's generation_kwargs mean."""
    rest: dict[str, Any] = dict(
      lm_eval_utils.normalize_gen_kwargs(kwargs, self.max_gen_toks)
    )
    max_tokens, until = rest.pop('max_gen_toks'), rest.pop('until') or []
    is_sampled = rest.pop('do_sample')
    temperature = rest.pop('temperature', None)
    filters = {name: rest.pop(name) for name in _FILTERS if name in rest}
    if rest:
      raise ValueError(
        f'generation_kwargs: got {rest}, expected only until,'
        f' max_gen_toks, do_sample, temperature, {", ".join(_FILTERS)}; change'
        ' the task'
      )
    if is_sampled and not temperature:
      raise ValueError(
        'generation_kwargs: got do_sample with temperature'
        f' {temperature}, expected one above 0'
      )
    return ports.SampleSettings(
      max_tokens=max_tokens,
      temperature=temperature if is_sampled else 0.0,
      # A filter never removes the most probable token, which greedy takes.
      filters=filters if is_sampled else {},
      seed=self._seed,
      stop=tuple(stop for stop in until if stop),
    )

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns a name for the only template that there is, to record.

    Raises:
      ValueError: another one is asked for.
    """
    if not chat_template:
      return None
    if isinstance(chat_template, str):
      raise ValueError(
        f'apply_chat_template: got {chat_template!r}, expected True: the model'
        ' has one template'
      )
    self._check_chat()
    return str(self._model.description.get('chat_template', 'the model’s own'))

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns a conversation as a prompt.

    Args:
      chat_history: turns.
      add_generation_prompt: end with the opening of the next turn; if not, the
        last turn is left open, to be continued.
    """
    render = self._check_chat()
    text = render(chat_history, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
      return text
    last = chat_history[-1]['content'].strip()
    end = text.rfind(last)
    if end < 0:
      raise ValueError(
        f'chat: got a template that does not write {last[:60]!r}, expected one'
        ' that ends with the last message, to be continued'
      )
    return text[: end + len(last)]

  def _check_chat(self) -> ports.ChatFn:
    if self._model.render_chat is None:
      raise ValueError(
        'chat: got a model without a chat template, expected one that has one;'
        ' ask without chat'
      )
    return self._model.render_chat


def _args(requests) -> list[tuple[str, dict[str, Any]]]:
  return [request.args for request in requests]


def _hashable(value: Any) -> Any:
  """Returns a key for nested settings."""
  if isinstance(value, dict):
    return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
  if isinstance(value, list | tuple):
    return tuple(map(_hashable, value))
  return value
