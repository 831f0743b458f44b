"""What a scorecard is made of, one file a metric."""
