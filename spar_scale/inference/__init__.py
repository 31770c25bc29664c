"""Using trained models: reconstruction of photographs."""
