"""The command line: one command to a file, joined in `main`."""
