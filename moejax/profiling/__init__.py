"""Measurements of compiled programs."""
