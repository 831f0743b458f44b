"""What the flows need of Prefect: artifacts, its embedded server, the state of other flow runs."""
