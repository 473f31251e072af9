"""Encoders compared over their stores: an Adaptor and tasks for each pair, and what of their differences is real."""
