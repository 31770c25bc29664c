"""How the models are cut over tensor ranks, and what their layers cost."""
