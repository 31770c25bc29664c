"""Tables that join the models to `parallel`: which module is cut how."""
