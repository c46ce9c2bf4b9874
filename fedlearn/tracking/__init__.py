"""Where a run's numbers go besides its folder: epsilon while it runs, TensorBoard, MLflow."""
