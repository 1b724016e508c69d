"""schemathesis: no request of any shape gets a 5xx or an undocumented answer.

Its generated clients read the OpenAPI document alone. All checks are on. One of
them expects every body that the schemas allow to be taken: a server may refuse
it with 400, since no schema says which prompt fits into the context.
"""

import json
import re
import subprocess
import sys

import httpx2
import pytest

from tests.helpers.serving import servers

pytest.importorskip(
  'schemathesis',
  reason='not installed: pip install -r requirements-clients.txt',
)
_CONFIG = """\
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "409", "429"]
"""
_LEAST_CASES = 2000


def _pinned(document):
  """Returns the document with the model's name: any other is a 404."""
  for name, schema in document['components']['schemas'].items():
    if name.endswith('Request') and 'model' in schema['properties']:
      found = schema['properties']['model']
      names = [servers.MODEL, *([None] if 'anyOf' in found else [])]
      schema['properties']['model'] = {'enum': names}
  return document


def _run(tmp_path, url, source, num):
  """Returns the output of schemathesis, and how many cases it made."""
  (tmp_path / 'schemathesis.toml').write_text(_CONFIG)
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'schemathesis.cli'),
      *('--config-file', tmp_path / 'schemathesis.toml'),
      *('run', source, '--url', url, '--checks=all', '--seed=1'),
      *(f'--max-examples={num}', '--no-shrink', '--continue-on-failure'),
      *('--request-timeout=60', '--warnings=off', '--output-truncate=true'),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=1500,
    check=False,
  )
  # A body may have thousands of parts.
  lines = (done.stdout + done.stderr).split('\n')
  output = '\n'.join(line[:300] for line in lines)
  assert done.returncode == 0, output
  found = re.search(r'([\d,]+) generated', output)
  assert found, output
  return int(found[1].replace(',', ''))


@pytest.mark.slow
def test_every_answer_is_documented_and_none_is_an_error_of_the_server(
  served, tmp_path
):
  document = httpx2.get(f'{served.url}/openapi.json').json()
  num = _run(tmp_path, served.url, f'{served.url}/openapi.json', 40)
  pinned = tmp_path / 'openapi.json'
  pinned.write_text(json.dumps(_pinned(document)))
  num += _run(tmp_path, served.url, pinned, 250)
  assert num >= _LEAST_CASES
  assert httpx2.get(f'{served.url}/ready').status_code == 200
