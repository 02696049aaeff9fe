"""The edge between two stages: hidden states from sender to receiver, no host copy in between."""
