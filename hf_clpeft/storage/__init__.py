"""The folder of a model: written as a whole or not at all, and checked before it is read."""
