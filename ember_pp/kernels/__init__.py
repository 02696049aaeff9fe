"""The operations of the model, and their plain torch references."""
