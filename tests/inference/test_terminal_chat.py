"""The terminal conversation: history is sent again, and nothing is lost."""

import dataclasses

from inference import generate, terminal_chat
from inference.engine import engine_config
from tests.helpers import frozen_dirs, hf_files
from text import hf_tokenizer


def _talk(generator, lines, **chosen):
  """Runs a conversation; returns all written text."""
  lines, written = iter(lines), []

  def read(prompt):
    written.append(prompt)
    line = next(lines, None)
    if line is None:
      raise EOFError
    return line

  terminal_chat.run(generator, chosen, read=read, write=written.append)
  return ''.join(written)


class _Recorder:
  """A generator that answers without a model and keeps its prompts."""

  def __init__(self, generator):
    self.frozen = generator.frozen
    self.settings_for = generator.settings_for
    self.asked = []

  def stream(self, prompt, settings):
    self.asked.append((prompt, settings))
    yield ' I '
    yield 'see.'


def test_each_turn_sends_the_whole_history(generator):
  recorder = _Recorder(generator)
  written = _talk(recorder, ['hi', '  ', 'and?', '/exit', 'never'], stop=('Q',))
  (first, settings), (second, _) = recorder.asked
  assert first == 'User: hi\n\nAssistant:'
  assert second == ('User: hi\n\nAssistant: I see.\n\nUser: and?\n\nAssistant:')
  assert settings.stop == ('\nUser:', '\nSystem:', '\nAssistant:', 'Q')
  assert written.count('Model:  I see.') == 2


def test_end_of_input_leaves(generator):
  assert _talk(generator, []).endswith('You: \n')


def test_a_turn_that_does_not_fit_is_not_kept(generator):
  recorder = _Recorder(generator)
  recorder.stream = _refuse_long(recorder, recorder.stream)
  written = _talk(recorder, ['hi', 'x' * 200, 'so'])
  assert 'error: prompt: too long\nThe message was dropped.' in written
  assert recorder.asked[-1][0] == (
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


def test_a_template_of_the_model_is_used(generator, monkeypatch):
  template = '{% for m in messages %}[{{ m.content }}]{% endfor %}>'
  with_template = dataclasses.replace(generator.frozen, chat_template=template)
  monkeypatch.setattr(generator, 'frozen', with_template)
  messages = [{'role': 'user', 'content': 'hi'}]
  assert terminal_chat.render(generator, messages) == ('[hi]>', ())


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
  assert ids == [tok.bos_id, *tok.encode('the </s>'), tok.eos_id]
  assert stop == ()
  # Verbatim: no second BOS.
  assert generator.prompt_ids(ids) == tuple(ids)
  written = _talk(generator, ['hi'], max_tokens=3, temperature=0.0)
  assert 'error' not in written
