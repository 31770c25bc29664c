"""Data: the miniature world, indexed tar shards, a sample order that does not depend on the layout, and the loader."""
