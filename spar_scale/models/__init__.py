"""Mathematics on one device: SPAR's parts and the published classes they wrap."""
