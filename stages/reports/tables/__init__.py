"""The tables of the paper: their specification, the runs they need, the results, and the page that shows them."""
