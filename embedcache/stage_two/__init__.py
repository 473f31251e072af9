"""Stage two: training Adaptors and heads on cached tensors. It never sees an encoder, only stores."""
