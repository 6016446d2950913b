"""Predicts what every device does, searches for the best layout, and audits the prediction against the compiler."""
