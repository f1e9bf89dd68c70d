"""Pushes models to the Hub and downloads them."""
