"""The reference training script and the paper's experiments; the library never imports it."""
