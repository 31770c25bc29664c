"""Using trained runs: pictures drawn and edited, routes, reconstructions, answers."""
