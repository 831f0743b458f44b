"""What writes parts of docs/: the references, from the code; the pictures, from runs."""
