"""Who may use the node, and how much: API keys, their limits and their sums."""
