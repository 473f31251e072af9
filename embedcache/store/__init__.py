"""The store: immutable, checksummed HDF5 shards, the only door between the stages."""
