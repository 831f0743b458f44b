"""Find, fetch, fingerprint and load a teacher."""
