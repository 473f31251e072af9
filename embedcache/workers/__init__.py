"""Processes that do work that was handed out: of this machine, of dask, or of ray."""
