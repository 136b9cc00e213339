"""The libraries that are timed: one module for each, imported only where it takes part."""
