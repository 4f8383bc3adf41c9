"""The page's style sheet, light and dark."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1d232b; --faint: #5b6672; --edge: #d9dee4;
  --stripe: #f3f5f8; --pass: #1a7f4b; --pass-back: #dff3e7; --warning: #8a5a00; --warning-back: #fdefcf;
  --failure: #b3261e; --failure-back: #fbe1df; --bar: #2f6fde; --bar-2: #9bb7e8; --mark: #b3261e; --link: #1f5fc4;
  --queue: #c4a000; --device: #2f6fde; --host: #0f9488; --decode: #d9692a; --processor: #8153c9; --other: #8b95a1; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1b2128; --ink: #e6eaef; --faint: #9aa6b2;
  --edge: #323b45; --stripe: #212830; --pass: #67d39b; --pass-back: #143626; --warning: #f2c14e;
  --warning-back: #3b2e0c; --failure: #ff8a80; --failure-back: #431a17;
  --bar: #5b93f0; --bar-2: #3c5a8f; --mark: #ff8a80; --link: #8ab4f8;
  --queue: #d8b71f; --device: #5b93f0; --host: #2fbfae; --decode: #f08a4b; --processor: #a883ea; --other: #7d8894; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main, header { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 10px; display: flex; gap: 10px; align-items: center; flex-wrap: wrap; }
h3 { font-size: 16px; margin: 22px 0 6px; overflow-wrap: anywhere; }
h4 { font-size: 14px; margin: 16px 0 4px; color: var(--faint); font-weight: 600; overflow-wrap: anywhere; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 18px 20px;
  margin: 18px 0; }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--edge);
  overflow-wrap: anywhere; }
td { min-width: 76px; }
.findings td:nth-child(2) { min-width: 100px; } .findings td:nth-child(3) { min-width: 190px; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--stripe); }
tbody tr:last-child td { border-bottom: 0; }
td:first-child, th:first-child { padding-left: 8px; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.chip { display: inline-block; border-radius: 999px; padding: 0 10px; font-size: 12px; font-weight: 600;
  line-height: 20px; white-space: nowrap; }
.chip.pass { color: var(--pass); background: var(--pass-back); }
.chip.warning { color: var(--warning); background: var(--warning-back); }
.chip.failure { color: var(--failure); background: var(--failure-back); }
.summary { list-style: none; margin: 0; padding: 0; }
.summary li { display: grid; grid-template-columns: 84px 220px 1fr; gap: 10px; padding: 8px 0; align-items: baseline;
  border-bottom: 1px solid var(--edge); }
.summary .chip { justify-self: start; }
.summary li:last-child { border-bottom: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 10px 0; }
.figures div { border: 1px solid var(--edge); border-radius: 8px; padding: 8px 14px; min-width: 150px; }
.figures b { display: block; font-size: 22px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figures span { color: var(--faint); font-size: 13px; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--link); }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px; }
svg { display: block; width: 100%; height: auto; margin: 8px 0; }
svg text { fill: var(--ink); font-size: 13px; }
svg .faint { fill: var(--faint); font-size: 12px; }
svg .bar { fill: var(--bar); } svg .second { fill: var(--bar-2); }
svg .mark { stroke: var(--mark); stroke-width: 2; } svg .marked { fill: var(--mark); }
svg .axis { stroke: var(--edge); } svg .lane { fill: var(--stripe); }
svg .queue { fill: var(--queue); } svg .device { fill: var(--device); } svg .host { fill: var(--host); }
svg .decode { fill: var(--decode); } svg .processor { fill: var(--processor); } svg .other { fill: var(--other); }
footer { color: var(--faint); font-size: 13px; padding: 4px 0 36px; }
@media print { section { break-inside: avoid; } }
"""
"""Fonts are those of the reader's system: nothing is fetched."""
