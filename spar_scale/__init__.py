"""SPAR as a distributed pretraining system: the models, the stages and the one trainer."""
