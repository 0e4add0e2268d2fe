"""Memory of training, tensor by tensor and over time, and how others count it."""
