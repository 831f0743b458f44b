"""How the page of a table looks, on top of the report's style, and what it says of its own figures."""

from __future__ import annotations

MORE_STYLE = """
body { max-width:84rem } .group { text-align:center } .group, .first { border-left:1px solid var(--line) }
.paper { color:var(--faint) } .claims p { max-width:60rem } h3 { font-size:1rem; margin:1.2rem 0 .2rem }
h3::first-letter { text-transform:uppercase }
.charts { grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr)) } path { stroke-width:1.2 }
@media (min-width:32rem) { .tick { font-size:10px } }
.rows { width:auto; table-layout:auto } .rows td, .rows th { width:8rem; vertical-align:top }
.rows td div { display:grid; grid-template-columns:1fr 1fr; gap:2px; width:8rem } .rows img { max-width:8rem }
.rows td div.one { grid-template-columns:1fr } table.plain td:not(:last-child) { white-space:nowrap }
.key i { margin-left:0; margin-right:.35rem } .key span { margin-right:1.1rem; white-space:nowrap }
"""
HOW = (
    "A figure is the mean over all seeds and prompts of a row. Its 95 % interval is Student's t on the variance "
    "between the means of the seeds plus that between the means of the prompts, with Satterthwaite's degrees of "
    "freedom, so that it speaks for other seeds and other prompts. A claim is judged by the difference of its two "
    "rows, seed by seed and prompt by prompt: it holds if the whole interval is above 0, does not hold if it is below, "
    "and is undecided if 0 lies in it. Each interval stands for itself: of 20 claims about differences that do not "
    "exist, one would be decided by chance. A seed is a training run of its own and evaluation noise of its own; rows "
    "of one seed met the same noise. One seed alone speaks for its prompts only."
)
TRAINED_ON = "the row was trained to raise this very number, so it proves little."
DIRECTION = (
    "The paper's numbers are of SD3-Medium, its own metrics and its own prompts: compare the direction of an effect, "
    "not its size."
)
