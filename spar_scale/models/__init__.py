"""Models: one folder for each family, the roles that their members play (roles.py), and the presets (presets.py)."""
