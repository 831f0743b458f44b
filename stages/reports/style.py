"""How a page looks, in light and in dark. Text has a contrast of 4.5 and more, marks of 3 and more (WCAG 2.1, AA)."""

from __future__ import annotations

LIGHT = {
    "ink": "#1b1e24",
    "faint": "#565d68",
    "paper": "#ffffff",
    "card": "#f3f4f7",
    "line": "#d5d9e0",
    "good": "#11703a",
    "bad": "#b3261e",
    "mark": "#b23a08",
}
DARK = {
    "ink": "#e7e9ee",
    "faint": "#a6aebb",
    "paper": "#14161a",
    "card": "#1e2127",
    "line": "#3a404b",
    "good": "#5fd08b",
    "bad": "#ff8a80",
    "mark": "#ffa062",
}
COLOURS = (
    "#2457c5",
    "#c2410c",
    "#137a3e",
    "#8b3fb0",
    "#0e7c86",
    "#8a6410",
    "#b3266b",
    "#5d6470",
)  # of what is compared
DARK_COLOURS = ("#7fa8ff", "#ffa062", "#5fd08b", "#d29bf0", "#5cc8d6", "#dfba5c", "#ff8fbf", "#aeb6c4")


def _variables(colours: dict[str, str], series: tuple[str, ...]) -> str:
    named = {**colours, **{f"c{number}": colour for number, colour in enumerate(series)}}
    return " ".join(f"--{name}:{colour};" for name, colour in named.items())


_SERIES = "\n".join(
    f".curve{n} {{ stroke:var(--c{n}) }} .dot{n} {{ fill:var(--c{n}) }} .key .k{n}, .bars .k{n} "
    f"{{ background:var(--c{n}) }}"
    for n in range(len(COLOURS))
)
STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT, COLOURS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, DARK_COLOURS)} }} }}
* {{ box-sizing:border-box }} body {{ margin:0 auto; max-width:76rem; padding:2rem 1.25rem 4rem;
  background:var(--paper); color:var(--ink); font:16px/1.5 system-ui,sans-serif; overflow-wrap:break-word }}
h1 {{ font-size:1.7rem; margin:0 0 .25rem; line-height:1.2 }} h2 {{ font-size:1.25rem; margin:2.75rem 0 .75rem }}
h3 {{ font-size:1.05rem; margin:1.6rem 0 .4rem }} p {{ margin:.4rem 0; max-width:46rem }}
.faint, small {{ color:var(--faint) }} small {{ font-size:.82rem }} code {{ font-size:.85rem }}
.card {{ background:var(--card); border-left:4px solid var(--line); border-radius:4px; padding:.7rem 1rem;
  margin:.6rem 0 }}
.remarks {{ margin:.6rem 0 1rem; padding-left:1.2rem; max-width:60rem }}
.cards {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr)); gap:.6rem 1rem }}
.cards .card {{ margin:0; max-width:none }} .cards small {{ display:block; margin-top:.3rem; line-height:1.4 }}
.card.better {{ border-color:var(--good) }} .card.worse, .card.undecided, .card.missing {{ border-color:var(--bad) }}
.better b, b.better {{ color:var(--good) }} .worse b, b.worse, b.undecided, b.bad {{ color:var(--bad) }}
.scroll {{ overflow-x:auto }} .scroll:focus-visible {{ outline:2px solid var(--c0); outline-offset:2px }}
table {{ border-collapse:collapse; font-variant-numeric:tabular-nums }}
th, td {{ text-align:right; padding:.4rem .8rem; border-bottom:1px solid var(--line); vertical-align:top }}
th:first-child, td:first-child {{ text-align:left; padding-left:0 }}
thead th {{ border-bottom:2px solid var(--line); vertical-align:bottom }} tbody th {{ font-weight:500 }}
td small, th small {{ display:block; font-weight:400; white-space:nowrap }} tr.total td {{ font-weight:600 }}
.sticky th:first-child {{ position:sticky; left:0; background:var(--paper);
  min-width:clamp(6.5rem,14vw,10.5rem); max-width:11rem }}
.sticky th:first-child small {{ white-space:normal }} .sticky tbody + tbody th, .reference td {{ color:var(--faint) }}
.sticky th.source {{ max-width:none; padding:1.1rem 0 .4rem }}
.source span {{ position:sticky; left:0; display:block;
  width:min(40rem,calc(100vw - 3rem)); font-size:.9rem; font-weight:500 }}
.sticky td, .sticky th:not(:first-child) {{ padding-left:.3rem; padding-right:.6rem }}
summary {{ cursor:pointer; padding:.3rem 0 }}
.mark {{ background:var(--mark); color:var(--paper); border-radius:3px; padding:0 .35rem; font-size:.75rem;
  font-weight:600; white-space:nowrap }}
.prompt {{ margin:1.1rem 0 .3rem; max-width:60rem }} .whole {{ white-space:nowrap }}
.side {{ display:grid; grid-template-columns:repeat(auto-fill,11rem); gap:.8rem }}
@media (max-width:34rem) {{ .side {{ grid-template-columns:1fr 1fr }} }}
.side figcaption {{ display:block; line-height:1.3 }} .side b, .side small {{ display:block }}
.side img, .strip img, .images img {{ display:block; width:100%; border-radius:3px }}
img.tiny {{ image-rendering:pixelated }}
.strips {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr)); gap:.8rem 1.25rem }}
.strip {{ display:grid; grid-template-columns:repeat(4,1fr); gap:3px }}
.images td, .images th {{ text-align:left; border:0; padding:.2rem .6rem .2rem 0 }}
.images .prompt {{ padding-top:1rem }}
.images small {{ white-space:normal; line-height:1.3 }} .images {{ width:100%; table-layout:fixed; min-width:34rem }}
.images td {{ width:25% }} .images img {{ max-width:11rem }}
.charts {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr)); gap:1.2rem 1.5rem }}
figure {{ margin:0 }} figcaption {{ display:flex; gap:.6rem; justify-content:space-between; font-size:.88rem }}
svg {{ width:100%; height:auto; display:block }} .plot {{ fill:var(--card) }}
.tick {{ fill:var(--faint); font-size:12px }}
path {{ fill:none; stroke-width:1.5 }} .guide {{ stroke:var(--line); stroke-width:1 }}
.border {{ stroke:var(--faint); stroke-dasharray:3 3; stroke-width:1 }}
.broken {{ stroke:var(--bad); stroke-width:1; opacity:.7 }}
.key i {{ display:inline-block; width:1.4rem; height:3px; vertical-align:middle; margin:0 .35rem 0 .9rem }}
ul.key {{ list-style:none; display:flex; flex-wrap:wrap; gap:.3rem 1.3rem; margin:.4rem 0 1rem; padding:0 }}
ul.key li {{ display:flex; gap:.45rem; align-items:center }} ul.key svg {{ width:16px; height:16px; flex:none }}
.blocks {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr)); gap:1.1rem 2rem;
  margin:.5rem 0 1.2rem }}
.bars {{ width:100%; table-layout:fixed; align-self:start }} .bars caption {{ text-align:left; font-weight:600 }}
.bars th, .bars td {{ border:0; padding:.12rem 0; font-size:.88rem; line-height:1.35; vertical-align:middle }}
.bars th {{ width:38%; padding-right:.6rem; font-weight:400 }} .bars td:last-child {{ width:3.6rem }}
.bars i {{ display:block; height:.7rem; border-radius:2px; min-width:1px }}
.bars .reference th {{ color:var(--faint) }} .bars .reference i {{ background:none; border:1.5px solid var(--faint) }}
.plain td {{ text-align:left; overflow-wrap:anywhere }} .plain td:first-child {{ overflow-wrap:normal; min-width:7rem }}
.plain code {{ white-space:pre-wrap }}
{_SERIES}
"""
