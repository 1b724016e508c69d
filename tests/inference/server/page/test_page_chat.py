"""The chat of the page, in headless Chromium, with a scripted server."""

import pytest

from tests.helpers.serving import browsers, fake_server, servers

_ENTER, _ESCAPE, _SHIFT = browsers.ENTER, browsers.ESCAPE, browsers.SHIFT


def test_an_answer_streams_with_its_figures_context_and_cost(page, fake):
  text = 'Grüße, 日本語 and 👩‍👩‍👧 – all of it.'
  reply = fake_server.said(text, read=400, cached=60)
  # Without a pause all of it may arrive at once, and no speed is shown.
  fake.replies.append([*reply[:3], 0.2, *reply[3:]])
  assert page.ask('Hello?') == text
  (body,) = fake.asked
  assert body == {
    'model': fake_server.MODEL,
    'messages': [{'role': 'user', 'content': 'Hello?'}],
    'stream': True,
    'stream_options': {'include_usage': True},
  }
  figures = page.text('.assistant .figures-line')
  for words in ('first token after 0.', 'tokens/s', '2.0 GFLOP'):
    assert words in figures
  num = len(fake_server.said(text)) - 3
  context = page.text('#context-text')
  assert context == f'Context: {400 + num} of 1,000 tokens are sent again'
  meter = page.find('#context')
  assert meter.get_attribute('aria-valuenow') == str(round((400 + num) / 10))
  cost = page.text('#cost')
  assert cost.startswith(f'So far 400 tokens read (60 cached), {num} written')
  # The screen reader is told once, when the answer is whole.
  assert page.text('#said') == f'{fake_server.MODEL}: {text}'


def test_the_whole_conversation_is_sent_again_and_its_cost_adds_up(page, fake):
  fake.replies += [
    fake_server.said('One.', read=700),
    fake_server.said('Two.', read=950),
  ]
  page.ask('First')
  assert page.find('.context').get_attribute('data-level') == 'low'
  page.ask('Second')
  assert fake.asked[1]['messages'] == [
    {'role': 'user', 'content': 'First'},
    {'role': 'assistant', 'content': 'One.'},
    {'role': 'user', 'content': 'Second'},
  ]
  assert 'So far 1,650 tokens read, 2 written' in page.text('#cost')
  assert page.find('.context').get_attribute('data-level') == 'full'
  assert 'It is full: begin a new conversation' in page.text('#context-text')
  page.button('New conversation').click()
  assert page.answers() == []
  assert page.text('#cost') == ''
  assert page.find('#empty')


def test_a_server_with_prices_has_a_cost_in_money(page, fake):
  page.ask('Hello?')
  assert 'price' not in page.text('#cost')
  fake.prices = {'prompt': 2000, 'cached': 100, 'completion': 5000}
  page.reload()
  fake.replies.append(fake_server.said('12345678', read=500, cached=200))
  page.ask('And now?')
  # 300 at 0.002, 200 at 0.0001, 2 at 0.005.
  assert page.text('#cost').endswith('price 0.630')


def test_settings_are_sent_where_they_are_chosen(page, fake):
  for name, value in {
    'system': 'Be brief.', 'temperature': '0.5', 'top_p': '0.9', 'top_k': '40',
    'max_tokens': '12', 'seed': '7', 'stop-strings': 'END\n###',
  }.items():  # fmt: skip
    page.find(f'#{name}').send_keys(value)
  page.ask('Hello?')
  assert fake.asked[0].items() >= {
    'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'max_tokens': 12, 'seed': 7,
    'stop': ['END', '###'],
  }.items()  # fmt: skip
  assert fake.asked[0]['messages'][0] == {
    'role': 'system',
    'content': 'Be brief.',
  }
  page.reload()
  assert page.find('#seed').get_attribute('value') == '7'
  page.find('#top_p').clear()
  page.find('#top_p').send_keys('2')
  page.send('Again')
  servers.until(lambda: page.find('#problem'))
  assert page.text('#problem-text').startswith('Top p: ')
  assert len(fake.asked) == 1
  page.button('Reset all').click()
  page.find('#retry').click()
  servers.until(lambda: len(fake.asked) == 2)
  assert 'top_p' not in fake.asked[1]


def test_stop_ends_the_stream_and_keeps_its_text(page, fake):
  reply = fake_server.said('Begun but never finished')
  fake.replies.append([*reply[:4], 30, *reply[4:]])
  page.send('Hello?')
  servers.until(lambda: 'Begun' in page.text('#turns'))
  assert not page.find('#send')
  page.driver.switch_to.active_element.send_keys(_ESCAPE)
  servers.until(lambda: page.answers())
  assert page.answers()[0].startswith('Begun')
  assert 'stopped by you' in page.text('.assistant .figures-line')
  assert '1 without a count' in page.text('#cost')
  servers.until(lambda: fake.num_left == 1)
  assert page.find('#send')
  assert page.script('return document.activeElement.id') == 'composer-text'
  # Its text is part of what is sent next.
  page.ask('Go on')
  assert fake.asked[1]['messages'][1]['content'].startswith('Begun')


def test_the_last_answer_is_made_again_and_the_last_message_edited(page, fake):
  fake.replies += map(fake_server.said, ('One.', 'Two.', 'Three.'))
  page.ask('Hello?')
  page.button('Regenerate').click()
  servers.until(lambda: page.answers() == ['Two.'])
  assert fake.asked[1] == fake.asked[0]
  page.button('Edit').click()
  box = page.find('#composer-text')
  assert box.get_attribute('value') == 'Hello?'
  assert page.find('#editing')
  box.send_keys(_ESCAPE)
  assert not page.find('#editing')
  assert box.get_attribute('value') == ''
  page.button('Edit').click()
  box.send_keys(' Or not?', _ENTER)
  servers.until(lambda: page.answers() == ['Three.'])
  assert [each['content'] for each in fake.asked[2]['messages']] == [
    'Hello? Or not?'
  ]
  # Answers that were replaced have cost something, too.
  assert '3 written' not in page.text('#cost').partition('·')[0][:6]
  assert 'So far 36 tokens read' in page.text('#cost')


def test_enter_sends_and_shift_enter_begins_a_line(page, fake):
  page.wait_until_ready()
  box = page.find('#composer-text')
  box.send_keys(_ENTER)  # nothing to send
  box.send_keys('a', _SHIFT + _ENTER + browsers.NULL, 'b')
  assert not fake.asked
  box.send_keys(_ENTER)
  servers.until(lambda: fake.asked)
  assert fake.asked[0]['messages'][0]['content'] == 'a\nb'


_HOSTILE = """\
<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">
<a href="javascript:window.hacked=1">x</a> [x](javascript:window.hacked=1) ![i](http://other.example/a.png)

```"><script>window.hacked = 1</script>
<b>code</b>
```

1. **<i>bold</i>** and `<u>code</u>`
   - nested *<s>em</s>*
"""


def test_what_a_model_writes_cannot_become_an_element(page, fake):
  fake.replies.append(
    [
      fake_server.delta(reasoning_content=_HOSTILE),
      *fake_server.said(_HOSTILE),
    ]
  )
  text = page.ask(_HOSTILE.replace('\n', ' '))
  assert '<script>window.hacked = 1</script><img src=x' in text
  assert page.script('return window.hacked') is None
  for tag in ('script', 'img', 'a', 'i', 'u', 's', 'b'):
    assert not page.script(
      'return document.querySelectorAll("#turns " + arguments[0]).length', tag
    )
  tags = 'return document.querySelector(".answer " + arguments[0]).textContent'
  assert page.script(tags, 'pre code') == '<b>code</b>'
  assert page.script(tags, 'ol > li > strong') == '<i>bold</i>'
  assert page.script(tags, 'ol > li > ul > li > em') == '<s>em</s>'
  assert page.script(tags, 'li > code') == '<u>code</u>'


@pytest.mark.parametrize(
  ('source', 'html'),
  [
    ('a **b** `c**d**`', '<p>a <strong>b</strong> <code>c**d**</code></p>'),
    ('2 * 3 * 4 = 24', '<p>2 * 3 * 4 = 24</p>'),
    ('snake__case__name', '<p>snake__case__name</p>'),
    ('**a *b* c', '<p>**a <em>b</em> c</p>'),
    ('- a\n- b\n\nc', '<ul><li>a</li><li>b</li></ul><p>c</p>'),
    ('3. a\n4. b', '<ol start="3"><li>a</li><li>b</li></ol>'),
    ('- a\n  - b\n- c', '<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>'),
    ('## Title', '<p class="heading">Title</p>'),
    ('> a\n> b', '<blockquote>a\nb</blockquote>'),
    ('a\n---\nb', '<p>a</p><hr><p>b</p>'),
  ],
)
def test_markdown_has_few_forms(page, source, html):
  assert _rendered(page, source) == html


def test_a_block_of_code_that_is_not_finished_is_code_already(page):
  shown = _rendered(page, 'text\n```py\nif a < b:\n  **no**')
  assert '<pre tabindex="0"><code>if a &lt; b:\n  **no**</code></pre>' in shown


def test_markdown_takes_time_in_proportion_to_its_text(page):
  """A square of 100,000 would take minutes."""
  for piece in ('*', '**', '`', '__', '# ', '```', '- ', '> ', '~', '[', '_a'):
    _rendered(page, piece * 100_000)
    _rendered(page, f'{piece} \n' * 5_000)


def _rendered(page, source):
  return page.driver.execute_async_script(
    """
    const [source, done] = arguments;
    import('/page/markdown.js').then(({ Shown }) => {
      const parent = document.createElement('div');
      new Shown(parent).update(source);
      done(parent.innerHTML);
    });
    """,
    source,
  )


def test_reasoning_and_calls_are_folded_and_results_are_sent(page, fake):
  tools = '[{"type": "function", "function": {"name": "weather"}}]'
  page.script('document.querySelector(".more").open = true')
  page.find('#tools').send_keys(tools)
  call = {'index': 0, 'id': 'c1', 'type': 'function'}
  fake.replies += [
    [
      fake_server.delta(reasoning_content='I should '),
      fake_server.delta(reasoning_content='look.'),
      fake_server.delta(
        tool_calls=[{**call, 'function': {'name': 'weather', 'arguments': ''}}]
      ),
      *(
        fake_server.delta(
          tool_calls=[{'index': 0, 'function': {'arguments': part}}]
        )
        for part in ('{"city"', ': "Bern"}')
      ),
      fake_server.ended('tool_calls'),
      fake_server.usage(30, 9),
    ],
    fake_server.said('It rains.'),
  ]
  page.send('Weather in Bern?')
  servers.until(lambda: page.find('[aria-busy="false"] .calls form'))
  assert fake.asked[0]['tools'][0]['function']['name'] == 'weather'
  folds = page.all('details.fold')
  assert [fold.text for fold in folds] == ['Reasoning', 'Tool call: weather']
  assert not any(fold.get_attribute('open') for fold in folds)
  folds[0].click()
  assert page.find('details.fold .plain').text == 'I should look.'
  assert page.text('.calls pre') == '{"city": "Bern"}'
  page.find('.calls textarea').send_keys('rain')
  page.button('Send results').click()
  servers.until(lambda: page.answers()[-1:] == ['It rains.'])
  assert fake.asked[1]['messages'][1:] == [
    {
      'role': 'assistant',
      'content': '',
      'tool_calls': [
        {
          'id': 'c1',
          'type': 'function',
          'function': {'name': 'weather', 'arguments': '{"city": "Bern"}'},
        }
      ],
    },
    {'role': 'tool', 'tool_call_id': 'c1', 'content': 'rain'},
  ]


def test_thumbs_send_the_conversation_and_are_taken_back(page, fake):
  page.ask('Hello?')
  page.button('Thumbs up').click()
  servers.until(lambda: fake.rated)
  assert fake.rated[0] == {
    'request_id': 'chatcmpl-1',
    'model': fake_server.MODEL,
    'messages': [{'role': 'user', 'content': 'Hello?'}],
    'answer': 'Hello.',
    'thumb': 'up',
  }
  pressed = '[aria-pressed="true"]'
  servers.until(lambda: page.find(pressed))
  page.button('Thumbs down').click()
  servers.until(lambda: page.find('form.better'))
  assert fake.deleted == ['fb_1']
  page.find('form.better textarea').send_keys('Good morning.')
  page.find('form.better input').send_keys('politer')
  page.button('Send both').click()
  servers.until(lambda: len(fake.rated) == 3)
  assert fake.rated[2].items() >= {
    'thumb': 'down', 'preferred': 'Good morning.', 'comment': 'politer',
  }.items()  # fmt: skip
  servers.until(lambda: 'Thank you' in page.text('.assistant'))
  page.button('Thumbs down').click()
  servers.until(lambda: not page.find(pressed))
  assert fake.deleted == ['fb_1', 'fb_2', 'fb_3']
  fake.feedback_status = 403
  page.button('Thumbs up').click()
  servers.until(lambda: 'stores no ratings' in page.text('.assistant'))
  assert not page.find(pressed)


def test_the_conversation_outlives_a_reload_in_its_tab_only(page, fake):
  fake.replies.append(fake_server.said('**One.**'))
  page.ask('Hello?')
  page.reload()
  servers.until(lambda: page.answers() == ['One.'])
  assert 'So far 12 tokens read' in page.text('#cost')
  page.driver.switch_to.new_window('tab')
  try:
    page.driver.get(page.url)
    servers.until(lambda: page.find('#empty'))
    assert page.answers() == []
  finally:
    page.driver.close()
    page.driver.switch_to.window(page.driver.window_handles[0])


def test_one_of_several_models_is_chosen(page, fake):
  fake.models = [
    fake_server.card('small', context=100),
    fake_server.card('large', context=5000),
  ]
  page.reload()
  servers.until(lambda: 'room for 100 tokens' in page.text('#context-text'))
  page.find('#model').send_keys('large')
  assert 'room for 5,000 tokens' in page.text('#context-text')
  page.ask('Hello?')
  assert fake.asked[0]['model'] == 'large'
