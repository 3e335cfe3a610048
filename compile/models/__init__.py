"""The model families: a package each, found through `registry`."""
