"""Several runs: chains of phases, side by side in processes, the demo, ablations, parity of layouts."""
