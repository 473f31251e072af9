"""Datasets, one file each: from what lies on disk, or is drawn, to a manifest."""
