"""Images from a run, before or after it is finished: the student in its own pipeline, and its teacher beside it."""
