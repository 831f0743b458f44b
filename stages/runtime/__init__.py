"""What a stage's process is given: its context, ranks, progress and device."""
