"""What runs the models: attention, generation, training, the run directory."""
