"""``job=batch``: every request of a JSONL input answered once, whatever dies on the way.

In this order, so that nothing is loaded for what could be known at once: find the files, lock
the output, read what an earlier run answered, check every line, find the model and compare
the manifest; then start the stages and run what is pending. ``docs/batch.md`` is the contract.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from ember_pp.checkpoint import BUNDLED_MODEL, locate
from ember_pp.config import BatchJob, Config
from ember_pp.coordinator.preparation import prepare
from ember_pp.errors import (
    EXIT_DRAINED,
    EXIT_FAILED,
    EXIT_OK,
    ConfigError,
    EmberError,
)
from ember_pp.jobs.batch_answers import AnswerWriter
from ember_pp.jobs.batch_input import BatchInput, decode_line, find_files
from ember_pp.jobs.batch_manifest import (
    build_manifest,
    check_same,
    fingerprint_folder,
    fingerprint_plain,
)
from ember_pp.jobs.batch_output import BatchOutput
from ember_pp.jobs.batch_requests import Requests, Shard
from ember_pp.jobs.batch_run import BatchClient, BatchRun
from ember_pp.jobs.progress import Progress, closing_table, counted
from ember_pp.jobs.session import open_client

Connect = Callable[[Config], contextlib.AbstractContextManager[BatchClient]]

_DEMO_OUTPUT = "ember-out/answers.jsonl"
_NUM_SHOWN_ANSWERS = 3
_SHOWN_CHARACTERS = 300


def run(
    config: Config,
    *,
    connect: Connect = open_client,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the batch that ``config.job`` describes; the exit code (``docs/batch.md``).

    SIGINT and SIGTERM, or ``stop`` set from outside, end it with what is done; a second signal
    does what it did before the job began.

    Raises:
        ConfigError: a file, folder or setting is wrong, or the output is another job's.
        BatchInputError: lines of the input cannot be used.
        EmberError: the model cannot run, or an answer cannot be written; all that was
            reported done is kept, and the same command goes on there.
    """
    job = config.job
    assert isinstance(job, BatchJob)
    stop = threading.Event() if stop is None else stop
    with stop_on_signals(stop), contextlib.ExitStack() as stack:
        plan = _plan_files(job)
        output = stack.enter_context(BatchOutput(plan.output, plan.errors))
        excluded = [path for path in (plan.output, plan.errors, output.manifest_path) if path]
        source = BatchInput(
            find_files(plan.input, exclude=excluded),
            max_line_bytes=config.coordinator.max_message_bytes,
        )
        stack.callback(source.close)
        _check_distinct(source, excluded)
        return _Batch(config, job, plan, output, source, stop, clock).run(connect)


@dataclasses.dataclass(frozen=True, slots=True)
class _Files:
    """Which files the job reads and writes; None stands for a standard stream."""

    input: Any
    output: Path | None
    errors: Path | None
    overwrite: bool
    is_demo: bool


def _plan_files(job: BatchJob) -> _Files:
    is_demo = job.input is None and job.output is None
    given_input = job.input if job.input is not None else str(_demo_prompts())
    if job.errors == "-":
        raise ConfigError("job.errors: expected a file; answers alone can go to -")
    if job.output is None and not is_demo:
        raise ConfigError("job.output: missing; give a file for the answers, or - for stdout")
    if job.output is not None and job.output.endswith(".gz"):
        raise ConfigError("job.output: answers are written unpacked; name the file without .gz")
    shard = Shard.parse(job.shard)
    output = job.output or _DEMO_OUTPUT
    if is_demo:
        Path(output).parent.mkdir(exist_ok=True)
    path = None if output == "-" else shard.name_file(Path(output))
    if job.errors is not None:
        errors: Path | None = shard.name_file(Path(job.errors))
    elif path is None or (path.exists() and not path.is_file()):
        errors = None
    else:
        errors = path.with_name(f"{path.name.removesuffix('.jsonl')}.errors.jsonl")
    if errors is not None and path is not None and errors.resolve() == path.resolve():
        raise ConfigError("job.errors: the same file as job.output; give another name")
    return _Files(given_input, path, errors, job.overwrite or is_demo, is_demo)


def _demo_prompts() -> Path:
    return Path(__file__).resolve().parent.parent / "demo" / "prompts.jsonl"


def _check_distinct(source: BatchInput, written: list[Path]) -> None:
    for file in source.files:
        if file.spool is None and any(p.exists() and p.samefile(file.path) for p in written):
            raise ConfigError(
                f"job.output: {file.name} is also an input; give the output another name"
            )


class _Batch:
    """One run of the job, from checked files to the closing table."""

    def __init__(
        self,
        config: Config,
        job: BatchJob,
        files: _Files,
        output: BatchOutput,
        source: BatchInput,
        stop: threading.Event,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._job = job
        self._files = files
        self._output = output
        self._source = source
        self._stop = stop
        self._clock = clock
        # Answers on stdout are for a program; what is for people then goes to stderr.
        self._table_stream: TextIO = sys.stderr if files.output is None else sys.stdout

    def run(self, connect: Connect) -> int:
        """The exit code."""
        manifest, requests = self._check_input()
        num_total = requests.ledger.num_pending + requests.num_bad
        if self._config.coordinator.address is None:
            prepare(self._config)  # what is wrong with the settings, before a file is touched
            model = _local_model(self._config)
            self._prepare_output(manifest, model.fingerprint)
            if not num_total:
                return self._report_nothing_to_do(requests)
            if self._stop.is_set():
                return EXIT_DRAINED
            with connect(self._config) as client:
                return self._run(requests, client, model)
        with connect(self._config) as client:
            model = _remote_model(client.status())
            self._prepare_output(manifest, model.fingerprint)
            if not num_total:
                return self._report_nothing_to_do(requests)
            return self._run(requests, client, model)

    def _check_input(self) -> tuple[dict[str, Any] | None, Requests]:
        manifest, answered = None, {}
        if not self._files.overwrite:
            manifest = self._output.read_manifest()
            answered = self._output.read_answered()
        own = self._config.coordinator if self._config.coordinator.address is None else None
        sizes = None if own is None else own.sampling_sizes
        requests = Requests(self._source, answered, Shard.parse(self._job.shard), sizes)
        requests.check(skip_bad_lines=self._job.on_bad_line == "skip")
        return manifest, requests

    def _prepare_output(self, old_manifest: dict[str, Any] | None, fingerprint: str) -> None:
        names = {"job.output": self._files.output, "job.errors": self._files.errors}
        manifest = build_manifest(
            self._config,
            self._job,
            fingerprint=fingerprint,
            inputs=self._source.describe(),
            files={key: path.name for key, path in names.items() if path is not None},
        )
        if old_manifest is not None:
            assert self._output.path is not None
            check_same(old_manifest, manifest, self._output.path)
        self._output.start(manifest, keep_answers=not self._files.overwrite)

    def _run(self, requests: Requests, client: BatchClient, model: _Model) -> int:
        num_total = requests.ledger.num_pending + requests.num_bad
        progress = Progress(
            sys.stderr, num_total=num_total, clock=self._clock, is_terminal=sys.stderr.isatty()
        )
        self._note_start(requests, progress)
        started_s = self._clock()
        batch_run = BatchRun(
            client,
            requests.pending(),
            self._output,
            AnswerWriter(model.folder, model.name),
            progress,
            window=self._job.max_open_requests,
            is_ordered=self._job.ordered,
            defaults=self._config.sampling.given(),
            base_seed=self._config.sampling.seed if model.is_remote else None,
            stop=self._stop,
            grace_s=self._config.shutdown.grace_s,
            clock=self._clock,
        )
        try:
            batch_run.run()
        except EmberError:
            progress.note(self._how_to_go_on(batch_run, num_total))
            raise
        finally:
            progress.close()
        num_left = num_total - batch_run.tally.num_ok - batch_run.tally.num_failed
        if not num_left:
            self._sort(requests)
        self._print_table(requests, batch_run, num_left, started_s)
        if num_left:
            progress.note(self._how_to_go_on(batch_run, num_total))
            return EXIT_DRAINED
        return EXIT_FAILED if batch_run.tally.num_failed else EXIT_OK

    def _note_start(self, requests: Requests, progress: Progress) -> None:
        if self._output.num_torn_bytes:
            progress.note(
                f"{self._output.path}: the last line was cut off by the end of an earlier run; "
                "its request runs again"
            )
        if requests.ledger.num_answered:
            progress.note(
                f"going on: {counted(requests.ledger.num_answered, 'answer')} in "
                f"{self._output.path}, {counted(requests.ledger.num_pending, 'request')} left"
            )
        if requests.ledger.num_foreign:
            progress.note(
                f"{self._output.path}: keeps {counted(requests.ledger.num_foreign, 'answer')} to "
                "requests that the input does not have"
            )

    def _how_to_go_on(self, batch_run: BatchRun, num_total: int) -> str:
        num_done = batch_run.tally.num_ok
        if not self._output.is_resumable:
            return f"answered {num_done:,} of {counted(num_total, 'request')}"
        return (
            f"answered {num_done:,} of {counted(num_total, 'request')}; the same command goes on "
            f"from {self._output.path}"
        )

    def _sort(self, requests: Requests) -> None:
        """Answers of earlier runs may stand before those that belong in front of them."""
        if self._job.ordered and self._output.is_resumable and requests.ledger.num_answered:
            self._output.sort(requests.ledger.line_number_of, requests.num_lines)

    def _report_nothing_to_do(self, requests: Requests) -> int:
        self._sort(requests)
        if requests.ledger.num_answered:
            num_answered = counted(requests.ledger.num_answered, "request")
            text = f"{num_answered} answered in {self._output.path}, none left"
        else:
            text = "the input has no requests"
        self._print(f"nothing to do: {text}")
        return EXIT_OK

    def _print_table(
        self, requests: Requests, batch_run: BatchRun, num_left: int, started_s: float
    ) -> None:
        now_s = self._clock()
        ready_s = now_s if batch_run.ready_s is None else batch_run.ready_s
        files = {"answers": self._output.answers.name}
        if batch_run.tally.num_failed:
            files["errors"] = self._output.errors.name
        table = closing_table(
            batch_run.tally,
            num_answered_before=requests.ledger.num_answered,
            num_left=num_left,
            loading_s=ready_s - started_s,
            elapsed_s=now_s - ready_s,
            files=files,
            status=batch_run.status,
        )
        self._print(table)
        if self._files.is_demo:
            self._print(_sample_of(self._source, self._output))

    def _print(self, text: str) -> None:
        print(text, file=self._table_stream, flush=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    """What the job knows of the model before it runs."""

    fingerprint: str
    folder: Path | None
    name: str | None
    is_remote: bool


def _local_model(config: Config) -> _Model:
    """The one that the job will load."""
    model = config.model
    if model.path is None or (model.load == "random" and model.architecture is not None):
        folder = None if model.path is None else Path(model.path).expanduser()
        if folder is not None and not (folder / "config.json").is_file():
            folder = None  # random weights need no files
        fingerprint = fingerprint_plain(model.architecture)
        return _Model(fingerprint, folder, model.path, is_remote=False)
    folder = locate(model.path, model.revision)
    return _Model(fingerprint_folder(folder), folder, model.path, is_remote=False)


def _remote_model(status: Mapping[str, Any]) -> _Model:
    """The one that a running coordinator serves."""
    model = status.get("model", {})
    path = model.get("path")
    folder = None
    if path == BUNDLED_MODEL or (path and Path(path).is_absolute() and Path(path).is_dir()):
        folder = locate(path)
    return _Model(fingerprint_plain(model), folder, path, is_remote=True)


def _sample_of(source: BatchInput, output: BatchOutput) -> str:
    """A few prompts and their answers, shortened, for someone who sees this first."""
    assert output.path is not None
    answers = {}
    for raw in output.path.read_bytes().splitlines():
        answer = json.loads(raw)
        answers[answer["custom_id"]] = answer["response"]["body"]["choices"][0]
    requests = [decode_line(line.raw or b"{}") for line in source.lines()]
    answered = [request for request in requests if request.get("custom_id") in answers]
    step = max(1, -(-len(answered) // _NUM_SHOWN_ANSWERS))
    shown = [
        (_prompt_of(r), _text_of(answers[r["custom_id"]])) for r in answered[step // 2 :: step]
    ]
    return "".join(f"\n> {prompt}\n{_shortened(text)}\n" for prompt, text in shown)


def _prompt_of(request: Mapping[str, Any]) -> str:
    messages = request.get("messages") or [{"content": request.get("prompt")}]
    return str(messages[-1]["content"])


def _text_of(choice: Mapping[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"]).strip()


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM sets ``stop``; a second does what it did before.

    Python lets only the main thread do this; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore()
