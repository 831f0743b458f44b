"""The metrics of a scorecard, one file a metric."""
