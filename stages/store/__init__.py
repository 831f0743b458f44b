"""The artifact store: addresses, records, seals, checkpoints; a folder or an object store."""
