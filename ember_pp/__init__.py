"""ember-pp: pipeline-parallel, multi-process runner for Qwen3 language models.

For use from Python: ``ember_pp.client`` (``Client``, ``AsyncClient``), ``ember_pp.errors`` and
``ember_pp.sampling_params``. None of them loads torch.
"""

__version__ = "0.1.0"
