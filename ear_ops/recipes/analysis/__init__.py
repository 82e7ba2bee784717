"""Where sentences of different languages lie: alignment measures by layer, and pictures of them."""
