"""ember-pp: pipeline-parallel, multi-process runner for Qwen3 language models."""

__version__ = "0.1.0"
