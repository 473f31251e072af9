"""One YAML file to the whole pipeline: both stages, every encoder, one table."""
