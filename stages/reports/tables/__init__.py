"""The paper's tables: what a table is (spec), which runs it needs (plan), what they found (results), the page."""
