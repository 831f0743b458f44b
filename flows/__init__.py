"""Chaining: Prefect lives here and nowhere else. Imports without torch, which only a stage's own process needs."""
