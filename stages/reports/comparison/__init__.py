"""Runs side by side: read (results), merged into one scorecard, remarked upon, and shown on one page."""
