"""One model over many ranks."""
