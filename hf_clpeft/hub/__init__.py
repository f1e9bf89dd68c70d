"""How a model meets people: its card, and its way to the Hub and back."""
