"""Native parts of the runtime: their sources, what builds them, and what was built."""
