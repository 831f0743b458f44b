"""The flows: Prefect and Kubernetes are used here and nowhere else. All of it imports without torch."""
