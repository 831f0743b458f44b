"""A cluster for tests: the Batch and Core API over HTTP, and pods that are real processes."""
