"""The one process that owns requests, text, blocks and the schedule; never loads torch."""
