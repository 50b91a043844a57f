"""What models can do: recall, perplexity against context, and the comparison of mixers."""
