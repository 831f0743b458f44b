"""The stages of a run, each started as `python -m stages STAGE`."""
