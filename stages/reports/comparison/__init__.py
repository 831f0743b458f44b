"""Runs side by side: results.py reads them, merged.py makes one scorecard of theirs, page.py shows it."""
