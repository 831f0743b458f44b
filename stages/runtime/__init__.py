"""The process of a stage: its command line, context, ranks, device, progress and provenance."""
