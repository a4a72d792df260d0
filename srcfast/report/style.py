"""The page's style sheet: light and dark by the reader's setting, and fit to print."""

STYLE = """
:root {
  --paper: #ffffff; --ink: #1c2127; --soft: #5c6670; --rule: #dde2e7; --wash: #f5f7f9;
  --blue: #2f6db5; --orange: #c2661a; --green: #2f8552; --red: #b4443c; --violet: #7a55a8; --gray: #8a949e;
  --green-wash: #e7f4ec; --red-wash: #fbecea;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15191e; --ink: #e3e7eb; --soft: #9aa5b0; --rule: #333b44; --wash: #1d2329;
    --blue: #6aa7ea; --orange: #e5924c; --green: #5cbb82; --red: #e37d74; --violet: #b392dd; --gray: #7c8792;
    --green-wash: #1b2f24; --red-wash: #362120;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p, ul { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
nav { margin: 1.2rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem;
  margin: 1.6rem 0 .6rem; }
.tile { border: 1px solid var(--rule); border-radius: .6rem; padding: .9rem 1.1rem; break-inside: avoid; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile b small { font-size: .95rem; font-weight: 500; color: var(--soft); }
.tile span { color: var(--soft); font-size: .88rem; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0 .4rem; min-width: 60%; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { padding: .34rem .75rem; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; }
th { white-space: nowrap; font-weight: 600; color: var(--soft); font-size: .84rem; vertical-align: bottom; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td { white-space: nowrap; }
th.over { text-align: center; color: var(--ink); border-bottom-color: var(--soft); }
.settings td { white-space: normal; overflow-wrap: anywhere; }
tbody.group td { border-bottom: 0; padding-top: .2rem; padding-bottom: .2rem; }
tbody.group tr:first-child td { padding-top: .6rem; }
tbody.group tr:last-child td { border-bottom: 1px solid var(--rule); padding-bottom: .6rem; }
td small { color: var(--soft); }
.up { color: var(--green); } .down { color: var(--red); }

figure { margin: 1rem 0; break-inside: avoid; overflow-x: auto; }
figure svg { width: 100%; min-width: 40rem; height: auto; color: var(--ink); display: block; }
.bars { display: grid; grid-template-columns: minmax(8rem, 19rem) 1fr minmax(4rem, max-content);
  gap: .3rem .8rem; align-items: center;
  margin: .7rem 0; max-width: 50rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: .95rem; border-radius: .2rem; background: var(--wash); }
.bars i::before { content: ""; display: block; height: 100%; width: var(--share); min-width: 1px;
  border-radius: .2rem;
  background: var(--colour, var(--blue)); }
.bars span:nth-child(3n) { text-align: right; }

.card { border: 1px solid var(--rule); border-radius: .6rem; padding: 1rem; margin: 1rem 0;
  break-inside: avoid;
  display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 1.2rem; }
.card img { width: 100%; border-radius: .35rem; border: 1px solid var(--rule); }
.card img.small { image-rendering: pixelated; }
.card h3 { margin: 0 0 .1rem; font-size: 1.03rem; overflow-wrap: anywhere; }
.candidate { border-left: .25rem solid var(--rule); padding: .3rem .7rem .4rem; margin: .6rem 0 0;
  font-size: .92rem;
  overflow-wrap: anywhere; }
.candidate.chosen { border-color: var(--green); background: var(--green-wash); }
.candidate.rejected { border-color: var(--red); background: var(--red-wash); }
.head { display: flex; flex-wrap: wrap; gap: .1rem .8rem; font-size: .84rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.head b { color: var(--ink); }
.chosen .head b { color: var(--green); } .rejected .head b { color: var(--red); }
.sentence { display: block; } .answer { display: block; font-weight: 600; }
.kind { color: var(--soft); font-size: .8rem; margin-right: .4rem; }
.true::after { content: " \\2713"; color: var(--green); } .false::after { content: " \\2717";
  color: var(--red); }
.unverifiable::after { content: " ?"; color: var(--soft); }
.missing { padding: 3rem .5rem; text-align: center; background: var(--wash); border-radius: .35rem; }
details summary { cursor: pointer; color: var(--soft); font-size: .88rem; margin-top: .6rem; }
@media (max-width: 40rem) { .tile b { font-size: 1.35rem; } .card { grid-template-columns: 1fr;
  } .card img { max-width: 14rem; } }
@media print {
  :root { --paper: #ffffff; --ink: #000000; --soft: #444444; --rule: #cccccc; --wash: #f2f2f2;
    --blue: #2f6db5; --orange: #c2661a; --green: #2f8552; --red: #b4443c; --violet: #7a55a8; --gray: #8a949e;
    --green-wash: #eef7f1; --red-wash: #fdf3f2; }
  body { font-size: 9.5pt; padding: 0; max-width: none; }
  h2 { margin-top: 1.6rem; }
  .scroll, figure { overflow: visible; }
  figure svg { min-width: 0; }
  table { font-size: 7.8pt; min-width: 0; break-inside: avoid; }
  th { font-size: 7.2pt; }
  th, td { padding: .18rem .38rem; }
  .tile b { font-size: 1.25rem; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .bars { break-inside: avoid; font-size: 8.5pt; gap: .15rem .8rem; }
  tr { break-inside: avoid; }
  nav { display: none; }
  h2, h3, p { break-after: avoid; }
  i, i::before, .candidate { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
