"""The files of the page: their headers, and what they may not contain."""

import re

import httpx2
import pytest

from inference.server.access import api_keys
from inference.server.http import page_files
from tests.helpers.serving import servers

_FILES = sorted(page_files._DIRECTORY.iterdir())


def test_the_page_is_served_with_a_strict_policy(http):
  answer = http.get('/')
  assert answer.status_code == 200
  assert answer.headers['content-type'] == 'text/html; charset=utf-8'
  policy = dict(
    each.split(' ', 1)
    for each in answer.headers['content-security-policy'].split('; ')
  )
  assert policy['default-src'] == "'none'"
  assert policy['script-src'] == policy['connect-src'] == "'self'"
  assert policy['frame-ancestors'] == policy['base-uri'] == "'none'"
  assert 'unsafe' not in str(policy)
  assert answer.headers['x-content-type-options'] == 'nosniff'
  assert answer.headers['x-request-id']


def test_every_file_that_is_named_is_served(http):
  named = set(re.findall(r'(?:href|src)="(page/.*?)"', http.get('/').text))
  assert {'page/main.js', 'page/page.css', 'page/icon.svg'} <= named
  imported = {
    f'page/{name}'
    for path in _FILES
    if path.suffix == '.js'
    for name in re.findall(r"from '\./(.*?)'", path.read_text('utf-8'))
  }
  for path in named | imported:
    answer = http.get(f'/{path}')
    assert answer.status_code == 200, path
    assert answer.headers['x-content-type-options'] == 'nosniff'
    kind = {'js': 'text/javascript', 'css': 'text/css', 'svg': 'image/svg'}
    expected = kind[path.rpartition('.')[2]]
    assert answer.headers['content-type'].startswith(expected)


def test_a_file_that_a_browser_has_is_not_sent_again(http):
  first = http.get('/page/page.css')
  assert first.headers['cache-control'] == 'no-cache'
  tag = first.headers['etag']
  for known in (tag, f'W/{tag}', f'"other", {tag}'):
    again = http.get('/page/page.css', headers={'if-none-match': known})
    assert (again.status_code, again.content) == (304, b'')
  other = http.get('/page/page.css', headers={'if-none-match': '"other"'})
  assert other.content == first.content
  head = http.head('/')
  assert (head.status_code, head.content) == (200, b'')
  assert int(head.headers['content-length']) == len(http.get('/').content)


@pytest.mark.parametrize(
  'path',
  ['/page/', '/page/index.html', '/page/../app.py', '/page/%2e%2e/app.py',
   '/page/main.js/', '/page/none.js', '/page/..%2f..%2fserver_config.py'],
)  # fmt: skip
def test_nothing_else_is_a_file(served, path):
  answer = httpx2.get(httpx2.URL(served.url).copy_with(raw_path=path.encode()))
  assert answer.status_code == 404


def test_the_page_needs_no_key_and_the_api_does(generator, tmp_path):
  (tmp_path / 'keys').write_text('alice:key')
  keys = api_keys.read(tmp_path / 'keys')
  with servers.running(generator, keys) as served:
    assert httpx2.get(served.url).status_code == 200
    assert httpx2.get(f'{served.url}/page/main.js').status_code == 200
    assert httpx2.post(served.url).status_code == 401
    assert httpx2.get(f'{served.url}/v1/models').status_code == 401


@pytest.mark.parametrize('path', _FILES, ids=lambda path: path.name)
def test_a_file_asks_no_other_host_and_makes_no_html(path):
  text = path.read_text('utf-8')
  hosts = set(re.findall(r'\w+://[\w.]+', text))
  assert hosts <= {'http://www.w3.org'}  # the name of SVG, never asked
  for word in ('innerHTML', 'outerHTML', 'insertAdjacentHTML', 'eval(',
               'document.write', 'DOMParser', 'srcdoc', 'new Function',
               'style=', 'onclick', 'onload='):  # fmt: skip
    assert word not in text
  assert len(text.splitlines()) <= 500
