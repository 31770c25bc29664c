"""Programs of several runs: chains of phases in concurrent processes, the demo, ablations, parity of layouts."""
