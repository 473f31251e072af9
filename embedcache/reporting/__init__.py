"""The report of a run: what is gathered from its directory, and the files that are made of it."""
