"""Programs that draw a run's curves: TensorBoard, Weights & Biases, trackio, MLflow."""
