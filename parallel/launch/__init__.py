"""A process in its world: who it is, how ranks meet, agree, are watched and end. Import the module that you need."""
