"""How a stage is started: as a process of this machine, or as a Job of Kubernetes."""
