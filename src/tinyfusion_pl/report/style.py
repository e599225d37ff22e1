"""The style sheet of the page: light, dark and print, without scripts or external files."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #22252e; --soft: #5a6070; --line: #dfe2ea;
  --paper: #fff; --tint: #f5f6fa; --kept: #3b2e8c;
  --teacher: #0072b2; --pruned: #c45300; --recovered: #00805d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaf0; --soft: #a5abba; --line: #3a3f4d;
    --paper: #16181f; --tint: #20232d; --kept: #b3a8ff;
    --teacher: #6cb8ee; --pruned: #ff9a57; --recovered: #4fd0a7;
  }
  figure img { filter: brightness(.92); }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.25; margin: .2rem 0 .8rem; }
h2 {
  font-size: 1.25rem; margin: 2.6rem 0 .2rem; padding-top: .9rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
h2 a, nav a { color: inherit; text-decoration: none; }
h2 a:hover, nav a:hover { text-decoration: underline; }
p { margin: .4rem 0; }
nav {
  display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  font-size: .9rem; color: var(--soft); margin-top: 1rem;
}
.fact { display: inline-block; }
.soft, .about, figcaption { color: var(--soft); }
.about { font-size: .88rem; }
td .about { display: inline-block; min-width: 15rem; }
.note { border-left: 3px solid var(--pruned); padding-left: .8rem; }
figure { margin: 1rem 0; }
figure img {
  display: block; width: 100%; height: auto;
  background: #fff; border-radius: 8px; padding: 6px;
}
figcaption { font-size: .9rem; margin-top: .3rem; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .6rem 0;
}
th, td {
  padding: .38rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
thead th { border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; white-space: nowrap; width: 1%; padding-right: 2rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
.teacher { color: var(--teacher); }
.pruned { color: var(--pruned); }
.recovered { color: var(--recovered); }
.bar { display: inline-block; width: 10rem; }
.share {
  display: inline-block; height: .7rem; border-radius: 3px; background: var(--kept);
  min-width: 2px;
}
.strip {
  display: flex; flex-wrap: wrap; gap: 5px 10px; list-style: none; padding: 0; margin: .6rem 0;
}
.group { display: flex; flex-wrap: wrap; gap: 3px; }
.block {
  width: 2.1rem; text-align: center; padding: .2rem 0; border-radius: 5px; font-size: .85rem;
  border: 1.5px dashed var(--line); color: var(--soft); text-decoration: line-through;
}
.block.kept {
  border: 1.5px solid var(--kept); background: var(--kept); color: var(--paper);
  text-decoration: none; font-weight: 600;
}
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--soft); }
pre {
  background: var(--tint); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.45;
}
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --soft: #444; --line: #bbb;
    --paper: #fff; --tint: #fff; --kept: #3b2e8c;
    --teacher: #0072b2; --pruned: #c45300; --recovered: #00805d;
  }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  figure, tr, .strip { break-inside: avoid; }
  h2, h3, h2 + p, h3 + p { break-after: avoid; }
  figure img { filter: none; padding: 0; max-height: 22cm; object-fit: contain; }
  .block, .share { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  pre { white-space: pre-wrap; }
}
"""
