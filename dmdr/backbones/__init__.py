"""Model families behind one small protocol, one file a family."""
