"""Controllers: which steps to take."""
