"""What to look at while training: means of loss terms, ratios of gradients."""
