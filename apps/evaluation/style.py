"""The looks of a report: light and dark, a phone's width and a desk's."""

STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--faint:#5b6470;--rule:#dde1e6;--card:#f6f7f9;--warn:#fff6e0;
--warnline:#e0a100;--good:#0b6b3a;--bad:#b3261e;
--c0:#1f6feb;--c1:#d2541b;--c2:#1a7f4b;--c3:#8447c9;--c4:#b0860a;--c5:#c2338a;--c6:#0e8a94;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--faint:#9aa4b0;--rule:#2d333b;
--card:#1c2127;--warn:#2b2410;--warnline:#b98900;--good:#4cc38a;--bad:#ff8a80;
--c0:#6ea8ff;--c1:#ff9563;--c2:#56c98d;--c3:#bd93f9;--c4:#e3bb4d;--c5:#f27bbd;--c6:#4fd0da;--c7:#a3abb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:1.6em 0 .5em;padding-top:.9em;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.2em 0 .4em}
p{margin:.4em 0}
li,p{overflow-wrap:anywhere}
code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
.faint{color:var(--faint);font-size:.92rem}
small{display:block;color:var(--faint);font-size:.8rem}
.worse,small.worse{color:var(--bad);font-weight:600}
.better,small.better{color:var(--good);font-weight:600}
.warn{background:var(--warn);border-left:4px solid var(--warnline);padding:2px 16px 10px;
margin:20px 0;border-radius:4px}
.warn h2{border:0;margin:.5em 0 .2em;padding:0;font-size:1rem}
ul{padding-left:1.2em;margin:.4em 0}
.verdicts{list-style:none;padding:0}
.verdicts li{padding:6px 0}
.scroll{overflow-x:auto;margin:.6em 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 16px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--faint)}
td{white-space:nowrap}
td:first-child{white-space:normal;min-width:9em;position:sticky;left:0;background:var(--paper)}
.pictures td:first-child{position:static;min-width:72px}
figure{margin:0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
svg.plot{width:100%;max-width:600px;height:auto;display:block}
svg.curve{width:100%;max-width:260px;height:auto;display:block;margin-top:4px}
svg text{font:12px system-ui,sans-serif;fill:var(--ink);paint-order:stroke;stroke:var(--paper);
stroke-width:3px}
.card svg text{stroke:none}
svg .tick,svg .axis{fill:var(--faint);font-size:11px}
svg .strong{font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .mark{stroke:var(--faint);stroke-dasharray:4 3}
svg .front{fill:none;stroke:var(--faint);stroke-width:1.5;stroke-dasharray:5 3}
svg .curve .front{stroke-dasharray:none}
svg .base{fill:var(--c7)}
svg .whisker,svg .median{stroke:var(--ink);stroke-width:2}
svg .dots circle{opacity:.5}
svg .c0{fill:var(--c0);stroke:var(--c0)}svg .c1{fill:var(--c1);stroke:var(--c1)}
svg .c2{fill:var(--c2);stroke:var(--c2)}svg .c3{fill:var(--c3);stroke:var(--c3)}
svg .c4{fill:var(--c4);stroke:var(--c4)}svg .c5{fill:var(--c5);stroke:var(--c5)}
svg .c6{fill:var(--c6);stroke:var(--c6)}svg .c7{fill:var(--c7);stroke:var(--c7)}
svg g line{stroke-width:1.5}
svg rect,svg .dots{stroke:none}
img{display:block;width:100%;height:auto;border-radius:3px}
img.small{image-rendering:pixelated}
.pictures th{min-width:7em;vertical-align:middle;padding-right:10px}
.pictures td{padding:3px;border:0;width:92px;min-width:72px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:14px}
.card{background:var(--card);border-radius:8px;padding:10px 12px 12px}
.card p{margin:0 0 8px;font-size:.92rem}
.three{display:grid;grid-template-columns:repeat(3,1fr);gap:8px}
figcaption{color:var(--faint);font-size:.78rem;padding-top:3px}
details{margin:.6em 0}
summary{cursor:pointer;color:var(--faint)}
"""
