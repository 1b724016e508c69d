"""The terminal conversation: history is sent again, and nothing is lost."""

import dataclasses
import itertools
import pathlib
import types

import pytest

from inference import generate, terminal_chat
from inference.engine import engine_config
from inference.requests import requests
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import hf_files
from text import detokenize, hf_tokenizer

CHAT_TEMPLATES = pathlib.Path(__file__).parents[1] / 'text' / 'chat_templates'
TEMPLATES = {
  'qwen': 'chatml',
  'llama3': 'headers',
  'mistral': 'instruct',
  'llama2': 'instruct',
  'gemma': 'turns',
  'phi3': 'roles',
}


def _talk(generator, lines, system=None, **chosen):
  """Runs a conversation; returns all written text."""
  lines, written = iter(lines), []

  def read(prompt):
    written.append(prompt)
    line = next(lines, None)
    if line is None:
      raise EOFError
    return line

  terminal_chat.run(
    generator, chosen, read=read, write=written.append, system=system
  )
  return ''.join(written)


class _Recorder:
  """A generator that answers without a model and keeps its prompts."""

  def __init__(self, generator, says=' I see.', ends=b'\nUser:'):
    self.frozen, self.defaults = generator.frozen, generator.defaults
    self.tokenizer = generator.tokenizer
    self.prompt_ids = generator.prompt_ids
    self.settings_for = generator.settings_for
    self.asked = []
    self._says, self._ends = says, list(ends)

  def stream(self, prompt, settings):
    self.asked.append((prompt, settings))
    yield self._says[:2]
    yield self._says[2:]
    yield _completion(
      self._says, [*self.tokenizer.encode(self._says), *self._ends]
    )

  @property
  def texts(self):
    """The prompts as text."""
    return [self.tokenizer.decode(prompt) for prompt, _ in self.asked]


def _completion(text, ids, num_text_ids=None):
  """Returns a completion whose other fields do not matter."""
  fields = dict.fromkeys(
    f.name for f in dataclasses.fields(requests.Completion)
  )
  fields |= {'text': text, 'token_ids': ids}
  fields['num_text_ids'] = len(text) if num_text_ids is None else num_text_ids
  return requests.Completion(**fields)


def test_each_turn_sends_the_whole_history(generator):
  recorder = _Recorder(generator)
  written = _talk(recorder, ['hi', '  ', 'and?', '/exit', 'never'], stop=('Q',))
  first, second = recorder.texts
  assert first == 'User: hi\n\nAssistant:'
  assert second == ('User: hi\n\nAssistant: I see.\n\nUser: and?\n\nAssistant:')
  assert recorder.asked[0][1].stop == (
    '\nUser:', '\nSystem:', '\nAssistant:', 'Q',
  )  # fmt: skip
  assert written.count('Model:  I see.') == 2


def test_the_history_holds_the_ids_that_were_generated(generator):
  # White space at both ends, and the first of two line ends of the template.
  recorder = _Recorder(generator, says='  I  see. \n')
  _talk(recorder, ['hi', 'and?', 'so'])
  (first, _), (second, _), (third, _) = recorder.asked
  said = tuple(generator.tokenizer.encode('  I  see. \n'))
  assert second[: len(first + said)] == first + said
  assert third[: len(second + said)] == second + said
  assert recorder.texts[1] == (
    'User: hi\n\nAssistant:  I  see. \n\nUser: and?\n\nAssistant:'
  )


def test_a_system_prompt_comes_first(generator):
  recorder = _Recorder(generator)
  _talk(recorder, ['hi', 'and?'], system='Be brief.')
  assert recorder.texts[1] == (
    'System: Be brief.\n\nUser: hi\n\nAssistant: I see.\n\nUser: and?\n\n'
    'Assistant:'
  )


def test_a_template_that_refuses_a_system_prompt_does_so_at_once(
  generator, monkeypatch
):
  template = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    '{% endif %}{{ messages[-1].content }}'
  )
  frozen = dataclasses.replace(generator.frozen, chat_template=template)
  monkeypatch.setattr(generator, 'frozen', frozen)
  with pytest.raises(ValueError, match='chat template: no system'):
    _talk(generator, ['hi'], system='Be brief.')


@pytest.mark.parametrize('family', TEMPLATES)
@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_later_turns_begin_with_the_turns_before(family, system, tmp_path):
  template = (CHAT_TEMPLATES / f'{TEMPLATES[family]}.jinja').read_text('utf-8')
  hf_files.FAMILIES[family](tmp_path / 'theirs', template=template)
  tokenizer = hf_tokenizer.convert(tmp_path / 'theirs', tmp_path / 'ours')
  generator = types.SimpleNamespace(
    tokenizer=tokenizer, frozen=types.SimpleNamespace(chat_template=template)
  )
  talk = terminal_chat.Talk(generator, None if family == 'gemma' else system)
  before = ()
  for says in ('the cat', '  the  cat \n', ' \n', ''):
    asked = talk.ask('What is it?')
    assert asked.ids[: len(before)] == before
    if says in ('the cat', '  the  cat \n'):
      # No white space of 'the cat' is changed by a template.
      whole, _ = terminal_chat.render(generator, asked.messages)
      assert asked.ids == whole
    ids = tokenizer.encode(says)
    end = tokenizer.eos_id
    decoder = detokenize.StreamDecoder(tokenizer, is_continued=True)
    text = ''.join(map(decoder.push, ids))
    talk.keep(asked, _completion(text, [*ids, end], len(ids)))
    before = (*asked.ids, *ids)
  # The end of a turn stands there once, as the template writes it.
  asked = talk.ask('And now?')
  assert asked.ids[: len(before)] == before
  assert (end, end) not in itertools.pairwise(asked.ids)


def test_a_template_that_rewrites_its_history_is_followed(
  generator, monkeypatch
):
  # Mistral's moves the system prompt to the last message of the user.
  template = (
    '{% for m in messages[1:] %}{% if loop.last %}{{ messages[0].content }}|'
    '{% endif %}{{ m.content }};{% endfor %}'
  )
  frozen = dataclasses.replace(generator.frozen, chat_template=template)
  monkeypatch.setattr(generator, 'frozen', frozen)
  recorder = _Recorder(generator)
  _talk(recorder, ['hi', 'and?'], system='S')
  assert recorder.texts == ['S|hi;', 'hi; I see.;S|and?;']


def test_end_of_input_leaves(generator):
  assert _talk(generator, []).endswith('You: \n')


def test_a_turn_that_does_not_fit_is_not_kept(generator):
  recorder = _Recorder(generator)
  recorder.stream = _refuse_long(recorder, recorder.stream)
  written = _talk(recorder, ['hi', 'x' * 200, 'so'])
  assert 'error: prompt: too long\nThe message was dropped.' in written
  assert recorder.texts[-1] == (
    'User: hi\n\nAssistant: I see.\n\nUser: so\n\nAssistant:'
  )


def _refuse_long(recorder, stream):
  def refuse(prompt, settings):
    if len(prompt) > 200:
      raise ValueError('prompt: too long')
    return stream(prompt, settings)

  return refuse


def test_a_real_model_answers(generator):
  written = _talk(generator, ['hi'], max_tokens=5, temperature=0.0)
  assert 'Model: ' in written
  assert 'error' not in written


def test_the_context_is_named_when_history_outgrows_it(generator):
  written = _talk(generator, ['x' * 100], max_tokens=5)
  assert 'expected at most 64 together (the context of this model)' in written


def test_what_was_said_before_is_not_computed_again(generator):
  metrics = generator.engine.metrics
  before = metrics.value('cached_tokens_total')
  written = _talk(generator, ['a long one', 'k'], max_tokens=2, temperature=0.0)
  assert written.count('Model: ') == 2
  # The first turn has 29 tokens with BOS: three whole pages of eight.
  assert metrics.value('cached_tokens_total') - before >= 24


def test_a_stop_string_inside_a_token_leaves_the_text_before_it(tmp_path):
  hf_files.gpt2(tmp_path / 'theirs')
  tokenizer = hf_tokenizer.convert(tmp_path / 'theirs', tmp_path / 'ours')
  generator = types.SimpleNamespace(
    tokenizer=tokenizer,
    frozen=types.SimpleNamespace(chat_template=''),
    prompt_ids=tokenizer.encode,
  )
  talk = terminal_chat.Talk(generator)
  asked = talk.ask('hi')
  # ' the' is one token, of which a stop string has taken the end.
  (the,) = tokenizer.encode(' the')
  talk.keep(asked, _completion(' t', [the], 0))
  text = tokenizer.decode(talk.ask('so').ids)
  assert text == 'User: hi\n\nAssistant: t\n\nUser: so\n\nAssistant:'


def test_a_template_of_the_model_is_used(generator, monkeypatch):
  template = '{% for m in messages %}[{{ m.content }}]{% endfor %}>'
  with_template = dataclasses.replace(generator.frozen, chat_template=template)
  monkeypatch.setattr(generator, 'frozen', with_template)
  messages = [{'role': 'user', 'content': 'hi'}]
  ids = generator.prompt_ids('[hi]>')
  assert terminal_chat.render(generator, messages) == (ids, ())


@pytest.mark.slow
def test_an_open_model_gets_the_ids_of_its_template(tmp_path):
  template = (
    '{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}'
    '{% endfor %}'
  )
  hf_files.llama2(tmp_path / 'source', template=template)
  hf_tokenizer.convert(tmp_path / 'source', tmp_path / 'hf')
  frozen_dirs.write(
    tmp_path / 'm',
    config=frozen_dirs.config(num_layers=1, vocab_size=410),
    tokenizer_dir=tmp_path / 'hf',
    chat_template=template,
  )
  alone = engine_config.EngineConfig(
    max_sequences=1, max_chunks=1, max_mixed_chunks=1
  )
  generator = generate.load(tmp_path / 'm', alone)
  tok = generator.tokenizer
  messages = [{'role': 'user', 'content': 'the </s>'}]
  ids, stop = terminal_chat.render(generator, messages)
  assert list(ids) == [tok.bos_id, *tok.encode('the </s>'), tok.eos_id]
  assert stop == ()
  # Verbatim: no second BOS.
  assert generator.prompt_ids(ids) == tuple(ids)
  written = _talk(generator, ['hi'], max_tokens=3, temperature=0.0)
  assert 'error' not in written
