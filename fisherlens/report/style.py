"""How the page looks: on a laptop, on a wide screen and on paper."""

STYLE = """
:root { --ink: #1c2733; --soft: #53616f; --line: #dde3e9; --ground: #f5f7f9; --accent: #0b5a8f; --warm: #b3500a; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.6 -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
.frame { display: grid; grid-template-columns: 15rem minmax(0, 62rem); gap: 3.5rem; justify-content: center; padding: 0 2rem; }
main { padding: 2.5rem 0 5rem; min-width: 0; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow: auto; padding: 2.9rem 0 2rem; font-size: 0.9rem; }
nav ul { list-style: none; margin: 0; padding: 0; border-left: 2px solid var(--line); }
nav a { display: block; padding: 0.28rem 0 0.28rem 0.9rem; color: var(--soft); text-decoration: none; line-height: 1.35; }
nav a:hover, nav a:focus { color: var(--accent); box-shadow: -2px 0 0 var(--accent); }
nav .number { display: inline-block; min-width: 1.3rem; color: #93a0ac; font-variant-numeric: tabular-nums; }
.kicker { margin: 0 0 0.6rem; font-size: 0.78rem; letter-spacing: 0.09em; text-transform: uppercase; color: var(--soft); }
h1 { margin: 0; font-size: 2.4rem; line-height: 1.15; letter-spacing: -0.015em; }
h2 { margin: 0; font-size: 1.65rem; line-height: 1.25; letter-spacing: -0.01em; }
h2 .number { color: var(--accent); margin-right: 0.7rem; font-variant-numeric: tabular-nums; }
h3 { margin: 2.2rem 0 0.5rem; font-size: 1.12rem; }
p, ul, ol, dl { max-width: 46rem; }
a { color: var(--accent); }
sub { font-size: 0.72em; line-height: 0; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; white-space: nowrap; }
.command code { display: inline-block; background: var(--ground); padding: 0.5rem 0.8rem; border-radius: 6px; white-space: normal; }
pre { max-width: 46rem; overflow-x: auto; background: var(--ground); padding: 0.9rem 1.1rem; border-radius: 6px;
  font: 0.86rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
section { margin-top: 4rem; padding-top: 2.2rem; border-top: 1px solid var(--line); scroll-margin-top: 0; }
section#short { border-top: 0; margin-top: 2.4rem; padding-top: 0; }
.lead { font-size: 1.08rem; margin: 0.9rem 0 0.4rem; }
.about, .under { color: var(--soft); font-size: 0.9rem; margin: 0.3rem 0 0; max-width: none; }
.question { color: var(--soft); margin: 0.25rem 0 1rem; }
.headline { font-size: 1.16rem; line-height: 1.5; padding-left: 1rem; border-left: 3px solid var(--accent); margin: 0 0 1.3rem; }
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 0.8rem; margin: 1.7rem 0 0.7rem; }
.card { display: flex; flex-direction: column; padding: 0.85rem 1rem 0.95rem; background: var(--ground); border: 1px solid var(--line);
  border-radius: 8px; color: inherit; text-decoration: none; }
.card:hover, .card:focus { border-color: var(--accent); }
.card .label { font-size: 0.82rem; color: var(--soft); line-height: 1.3; }
.card .value { font-size: 1.65rem; line-height: 1.3; font-weight: 600; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.card .remark { font-size: 0.8rem; color: var(--soft); line-height: 1.35; }
.short { padding-left: 1.4rem; }
.short li { margin: 0 0 0.85rem; padding-left: 0.3rem; }
.short li::marker { color: var(--accent); font-weight: 600; }
.short a { color: var(--soft); font-size: 0.9rem; text-decoration: none; }
.short a:hover { text-decoration: underline; }
figure { margin: 1.8rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 46rem; margin-top: 0.6rem; font-size: 0.88rem; line-height: 1.5; color: var(--soft); }
figcaption strong { color: var(--ink); }
.table { margin: 1.6rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; line-height: 1.4; }
th, td { padding: 0.36rem 0.62rem; text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0.2rem; }
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid var(--ink); white-space: nowrap; }
tbody th { font-weight: 400; white-space: nowrap; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr.strong > * { background: var(--ground); font-weight: 600; }
thead th.n { padding-left: 0.3rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:not(.n) { min-width: 4rem; }
thead:has(th:first-child:empty) { display: none; }
.note, .warning, .missing, .caveat { max-width: 46rem; margin: 1rem 0; padding: 0.7rem 1rem; border-left: 3px solid var(--line); background: var(--ground);
  font-size: 0.92rem; overflow-wrap: anywhere; }
.warning, .missing { border-left-color: var(--warm); background: #fdf5ee; }
dl { display: grid; grid-template-columns: minmax(9rem, 12rem) 1fr; gap: 0.7rem 1.4rem; max-width: 56rem; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 1100px) {
  .frame { display: block; max-width: 64rem; margin: 0 auto; }
  nav { position: static; padding: 1.6rem 0 0; max-height: none; }
  nav ul { border: 0; display: flex; flex-wrap: wrap; gap: 0 1.2rem; }
  nav a { padding-left: 0; }
}
@media (max-width: 760px) { .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } .frame { padding: 0 1rem; } dl { display: block; } dd { margin-bottom: 0.7rem; } }
@media (min-width: 1700px) { body { font-size: 17px; } .frame { gap: 5rem; } }
@media print {
  @page { margin: 16mm 15mm; }
  html, body { font-size: 10pt; line-height: 1.45; }
  .cards { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .frame { display: block; padding: 0; }
  nav { display: none; }
  main { padding: 0; }
  section { margin-top: 1.6rem; padding-top: 1.1rem; }
  p, ul, ol, dl, figcaption, .note, .warning, .missing, .caveat { max-width: none; }
  h2, h3, .question, .headline { break-after: avoid; }
  figure, .table, .card, li, tr, dt, dd { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7.6pt; }
  th, td { padding: 0.22rem 0.4rem; }
  thead th, .n { white-space: normal; }
  .card, pre, code, tbody tr.strong > * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  a { color: inherit; text-decoration: none; }
}
"""
