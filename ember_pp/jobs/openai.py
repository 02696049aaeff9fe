"""OpenAI's forms: a batch line to a request, an answer to a response object. Pure, no I/O."""

from ember_pp.jobs.openai_answer import error_line, output_line, status_code, success_body
from ember_pp.jobs.openai_request import BatchRequest, parse_line, request_hash, to_submit_fields

__all__ = [
    "BatchRequest",
    "error_line",
    "output_line",
    "parse_line",
    "request_hash",
    "status_code",
    "success_body",
    "to_submit_fields",
]
