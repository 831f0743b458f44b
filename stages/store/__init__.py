"""The artifact store, in a folder or an object store: addresses, records, seals and checkpoints."""
