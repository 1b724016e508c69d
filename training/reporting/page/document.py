"""The document of a report: one HTML file that needs no other.

For screen and print, light and dark. It has no scripts and loads nothing from
another host; a content security policy in the page enforces both. Reports of
runs and of sweeps share it, so that both look alike.
"""

from collections.abc import Iterable, Mapping, Sequence
import html
import json
from typing import Any

from training.reporting.page import charts

# Screens may be dark; the print is always light.
_STYLE = f"""
:root {{ color-scheme: light dark; --paper: #f7f4ec; --sheet: #fffdf8;
  --ink: #20262a; --soft: #5a6165; --line: #ddd6c6; --cool: #17636a; }}
{charts.STYLE}
@media screen and (prefers-color-scheme: dark) {{
:root {{ --paper: #15191a; --sheet: #1d2223; --ink: #e9e4d8; --soft: #a5a89f;
  --line: #343b3c; --cool: #7cc7c4; }}
{charts.DARK}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font: 600 1.7rem/1.2 Georgia, 'DejaVu Serif', serif; margin: 0 0 .3rem; }}
h2 {{ font: 600 1.2rem/1.3 Georgia, 'DejaVu Serif', serif;
  margin: 2.2rem 0 .6rem; }}
p {{ margin: .4rem 0; }} p.soft, figcaption {{ color: var(--soft); }}
p.wrong {{ border-left: 3px solid #c0392b; padding-left: .7rem; }}
dl.facts {{ display: grid; gap: .7rem 1.2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }}
dl.facts div {{ border-top: 2px solid var(--cool); padding-top: .3rem; }}
dl.facts dt {{ color: var(--soft); font-size: .85rem; }}
dl.facts dd {{ margin: 0; font-size: 1.15rem;
  font-variant-numeric: tabular-nums; }}
.figures {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }}
figure {{ margin: 0; background: var(--sheet); border: 1px solid var(--line);
  border-radius: 4px; padding: .6rem; break-inside: avoid; }}
figure.whole {{ grid-column: 1 / -1; }}
figure svg {{ max-width: 100%; height: auto; display: block; margin: auto; }}
figcaption {{ font-size: .85rem; margin-bottom: .3rem; }}
figcaption b {{ color: var(--ink); font-weight: 600; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; }} tr.best td {{ font-weight: 600; }}
.code, pre {{ overflow-wrap: anywhere;
  font: 12px/1.45 ui-monospace, Menlo, 'DejaVu Sans Mono', monospace; }}
th.code {{ white-space: nowrap; }}
pre {{ background: var(--sheet); border: 1px solid var(--line);
  border-radius: 4px; padding: .7rem; margin: .3rem 0;
  white-space: pre-wrap; }}
pre mark {{ background: none; color: var(--cool); font-weight: 600; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; color: var(--cool); }}
:focus-visible {{ outline: 2px solid var(--cool); outline-offset: 2px; }}
@media print {{
  body {{ margin: 0; max-width: none; background: #fff; font-size: 11px; }}
  .figures {{ grid-template-columns: 1fr 1fr; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  h2 {{ break-after: avoid; }}
}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, parts: Iterable[str]) -> str:
  """Returns the page.

  Args:
    title: title of the tab; plain text.
    parts: HTML, in order.
  """
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n'
    f'<body><main>\n{"".join(parts)}</main></body></html>\n'
  )


def heading(words: str) -> str:
  """Returns the heading of a section."""
  return f'<h2>{html.escape(words)}</h2>\n'


def paragraph(words: str, kind: str = '') -> str:
  """Returns a paragraph of plain text."""
  return f'<p class="{kind}">{html.escape(words)}</p>\n'


def facts(named: Mapping[str, str]) -> str:
  """Returns a few figures, each large below its name."""
  items = ''.join(
    f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
    for name, value in named.items()
  )
  return f'<dl class="facts">{items}</dl>\n'


def figure(
  title: str, caption: str, svg: str, *, is_whole: bool = False
) -> str:
  """Returns a figure with its caption above.

  Args:
    is_whole: whether the figure takes the whole width of the page.
  """
  kind = ' class="whole"' if is_whole else ''
  words = f'<b>{html.escape(title)}</b> {html.escape(caption)}'
  return f'<figure{kind}><figcaption>{words}</figcaption>{svg}</figure>\n'


def figures(found: Iterable[str]) -> str:
  """Returns figures beside each other, as many as the width allows."""
  return f'<div class="figures">\n{"".join(found)}</div>\n'


def table(
  head: Sequence[str], rows: Iterable[Sequence[Any]], best: int | None = None
) -> str:
  """Returns a table.

  Args:
    head: names of the columns; empty: the first cell of a row is its name.
    rows: cells as plain text or numbers.
    best: index of the row that is set in bold.
  """
  columns = ''.join(
    f'<th scope="col">{html.escape(name)}</th>' for name in head
  )
  lines = [f'<thead><tr>{columns}</tr></thead>'] if head else []
  for i, row in enumerate(rows):
    cells = [html.escape(str(cell)) for cell in row]
    if not head:
      first = f'<th scope="row" class="code">{cells[0]}</th>'
      cells = [first, *(f'<td class="code">{cell}</td>' for cell in cells[1:])]
    else:
      cells = [f'<td>{cell}</td>' for cell in cells]
    kind = ' class="best"' if i == best else ''
    lines.append(f'<tr{kind}>{"".join(cells)}</tr>')
  return f'<div class="wide"><table>{"".join(lines)}</table></div>\n'


def details(title: str, inside: str) -> str:
  """Returns HTML that is folded away on a screen, and open in print."""
  return f'<details><summary>{html.escape(title)}</summary>{inside}</details>\n'


def values(tree: Any, prefix: str = '') -> list[tuple[str, str]]:
  """Returns the leaves of nested JSON values, by dotted name."""
  if isinstance(tree, Mapping) and tree:
    return [
      leaf
      for name, value in tree.items()
      for leaf in values(value, f'{prefix}.{name}' if prefix else str(name))
    ]
  if isinstance(tree, list) and any(isinstance(v, Mapping) for v in tree):
    return [
      leaf
      for i, value in enumerate(tree)
      for leaf in values(value, f'{prefix}[{i}]')
    ]
  return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]
