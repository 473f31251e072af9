"""Answers for new images: an encoder, an Adaptor, heads and a decoder of masks, from file to table."""
