"""Watches a training stage: what it looks at, what rings an alarm, and what is done about it."""
