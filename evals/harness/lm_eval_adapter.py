"""An adapter: a model of this project as a model of the LM Evaluation Harness.

Needs lm_eval (requirements-eval.txt). Only `lm_eval_tasks.py` imports this
file, and only when a task of lm_eval is read.

The adapter asks for the same tokens as lm_eval's own `hf` model: the same cut
between context and continuation, the same BOS, windows, truncation and stop
strings. So the same weights get the same scores. One behaviour is not copied:
if some prompts of a batch begin with BOS and others do not, `hf` treats all
prompts like the first.

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
_MAX_GEN_TOKENS = 256  # lm_eval's default for tasks without a number
# Filters that a task may set, by their names in transformers. Any other
# setting is refused, since the ports would ignore it.
_FILTERS = ('top_k', 'top_p', 'min_p')
# (texts or None, context ids, continuation ids)
_Request = tuple[Any, list[int], list[int]]


class LM(lm_eval_model.TemplateLM):
  """Answers lm_eval's requests through the ports.

  `loglikelihood` is inherited: it encodes contexts and continuations.
  """

  def __init__(self, model: ports.Model, *, seed: int = 0):
    """Wraps a model."""
    super().__init__()
    self._model = model
    self._seed = seed

  @property
  def eot_token_id(self) -> int:
    """Returns the id of the token that ends a document."""
    return self._model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """Returns the id that stands for an empty context."""
    return self._model.prefix

  @property
  def max_length(self) -> int:
    """Returns the tokens of the model's context."""
    return self._model.max_length

  @property
  def max_gen_toks(self) -> int:
    """Returns the most tokens of a completion, for tasks without a number."""
    return _MAX_GEN_TOKENS

  @property
  def tokenizer_name(self) -> str:
    """Returns the name under which lm_eval caches encoded requests."""
    tokenizer = self._model.tokenizer
    return str(
      self._model.description.get('tokenizer', type(tokenizer).__name__)
    ).replace('/', '__')

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Returns the ids of a text.

    Args:
      string: text in which names of special tokens become special tokens.
      add_special_tokens: whether BOS is put in front; None: if the model was
        trained with BOS, and the text does not begin with it.
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
    # No progress bar here: `logprob_fn` may report its own progress.
    del disable_tqdm, kwargs
    if not requests:
      return []
    pairs = [
      # A context of white space alone has no ids; lm_eval's hf fails there.
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
    scored = self._model.required_logprob_fn()([pair[:2] for pair in pairs])
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
    """Returns completions, each up to a stop string of the task.

    A request that occurs several times gets as many different samples.

    Raises:
      ValueError: the task has a setting that the ports lack, or asks for more
        tokens than the model's context.
    """
    del disable_tqdm
    asked = [
      (request.args[0], _hashable(request.args[1])) for request in requests
    ]
    waiting: dict[Any, list[int]] = {}
    for i, key in enumerate(asked):
      waiting.setdefault(key, []).append(i)
    # One call for all prompts with the same settings and number of samples.
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
    found = self._model.required_sample_fn()(ids, settings, num_samples)
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
    """Returns the settings for a task's generation_kwargs."""
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
    """Returns a name of the model's only template, for lm_eval's records.

    Raises:
      ValueError: the task asks for another template.
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
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns the prompt of a conversation.

    Args:
      chat_history: messages, oldest first.
      add_generation_prompt: True ends the prompt with the opening of the next
        turn. False leaves the last turn open, for the model to continue.
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
        'chat: got a model without a chat template, expected a model that has'
        ' one; leave chat out'
      )
    return self._model.render_chat


def _hashable(value: Any) -> Any:
  """Returns nested settings as a key of a dictionary."""
  if isinstance(value, dict):
    return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
  if isinstance(value, list | tuple):
    return tuple(map(_hashable, value))
  return value
