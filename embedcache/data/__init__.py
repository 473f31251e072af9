"""What goes in: manifests, radiographs, reports, and the generated phantom dataset."""
