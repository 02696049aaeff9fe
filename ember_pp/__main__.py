"""``python -m ember_pp`` and the ``ember-pp`` command: compose, validate, run the job.

The only file that knows Hydra and OmegaConf. A job gets a ``Config`` and returns its exit
code; everything that goes wrong ends here, as one line on stderr and an exit code:

    0  done                          2  bad configuration or input
    1  failed, or some of it did     3  the model cannot fit
    4  outside a tolerance          75  drained by a signal; run again to go on
    130  interrupted before there was anything to drain

With ``--multirun`` the worst code of all runs is returned: configuration (2) before cannot
fit (3), tolerance (4), failed (1), drained (75). A drained or interrupted run ends the sweep.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ember_pp import __version__
from ember_pp import config as config_module
from ember_pp.config import Config
from ember_pp.devices import parse_devices, takes_gpus
from ember_pp.errors import (
    EXIT_CANNOT_FIT,
    EXIT_CONFIG,
    EXIT_DRAINED,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_TOLERANCE,
    EmberError,
)
from ember_pp.sampling_params import suggest

PROGRAM = "ember-pp"
EXIT_INTERRUPTED = 130

_BEST_TO_WORST = (
    EXIT_OK,
    EXIT_DRAINED,
    EXIT_FAILED,
    EXIT_TOLERANCE,
    EXIT_CANNOT_FIT,
    EXIT_CONFIG,
)
# Hydra prints a composition error itself, over several lines, unless this is set: then it
# raises, and the error can be put as every other error of ours.
_HYDRA_RAISES = "HYDRA_FULL_ERROR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that ``arguments`` (default: the command line) describe; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "--version" in given:
            _print_version()
            return EXIT_OK
        code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has gone. Python flushes stdout once more when it ends;
        # pointed nowhere, that cannot fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001  a bug of ours: shown whole, and never exit code 0
        return _report_bug()


def worst_exit_code(codes: Sequence[int]) -> int:
    """The code that stands for all of ``codes``; one that is not ours counts as the worst."""
    known = {code: rank for rank, code in enumerate(_BEST_TO_WORST)}
    return max(codes, key=lambda code: known.get(code, len(known)), default=EXIT_OK)


def conf_folder() -> Path:
    """Where the presets lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def presets() -> list[str]:
    """The names that ``model=`` takes."""
    return sorted(path.stem for path in (conf_folder() / "model").glob("*.yaml"))


# --------------------------------------------------------------------------------------
# composing


def _run(arguments: list[str]) -> int:
    codes: list[int] = []
    wants_traceback = os.environ.get(_HYDRA_RAISES) == "1"

    def run_composed(composed: DictConfig) -> int:
        with _environment(_HYDRA_RAISES, "1" if wants_traceback else None):
            code = _run_one(composed)
        codes.append(code)
        if _is_sweep() and (code == EXIT_DRAINED or code >= EXIT_INTERRUPTED):
            raise SystemExit(code)  # what was asked to stop must not start the next run
        return code

    try:
        with _environment(_HYDRA_RAISES, "1"), contextlib.ExitStack() as stack:
            _prepare_hydra(stack)
            _call_hydra(run_composed, _quote_text(_choose_model(arguments)))
    except SystemExit as stop:
        codes.append(_exit_code(stop))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wants_traceback:
            traceback.print_exc()
        _say(_explain(error))
        return EXIT_CONFIG
    return worst_exit_code(codes)


def _prepare_hydra(stack: contextlib.ExitStack) -> None:
    store = ConfigStore.instance()
    store.store(name="defaults", node=config_module.default_plain())
    for name, job in config_module.JOBS.items():
        store.store(group="job", name=name, node=config_module.to_plain(job()))

    @functools.cache
    def sweep_folder() -> str:
        return stack.enter_context(tempfile.TemporaryDirectory(prefix="ember-pp-sweep-"))

    OmegaConf.register_new_resolver("sweep_dir", sweep_folder, replace=True)
    OmegaConf.register_new_resolver("stem", stem, replace=True)


def _call_hydra(task: Callable[[DictConfig], int], arguments: list[str]) -> None:
    decorate = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
    command_line = sys.argv
    sys.argv = [PROGRAM, *arguments]  # Hydra reads the command line and nothing else
    try:
        decorate(task)()
    finally:
        sys.argv = command_line


def stem(path: str) -> str:
    """``${stem:data/a.jsonl.gz}`` is ``a``: what outputs of a sweep are named after."""
    name = Path(str(path)).name
    for suffix in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(suffix)
    return name


def _choose_model(arguments: list[str]) -> list[str]:
    """A model of one's own must not take over the demo's data type and number of stages."""
    keys = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    if "model.path" in keys and not keys & {"model", "~model"}:
        return [*arguments, "~model"]
    return arguments


def _quote_text(arguments: list[str]) -> list[str]:
    """A value outside Hydra's grammar, such as a path with brackets, is taken as text."""
    parser = OverridesParser.create()
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not argument.startswith("-"):
            try:
                parser.parse_override(argument)
            except HydraException:
                argument = f'{key}="{_escape(value)}"'
        quoted.append(argument)
    return quoted


def _escape(text: str) -> str:
    """In Hydra's quotes a backslash is itself, unless a quote comes after it."""
    return re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', text))


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    _set_environment(name, value)
    try:
        yield
    finally:
        _set_environment(name, before)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# --------------------------------------------------------------------------------------
# one run


def _run_one(composed: DictConfig) -> int:
    if _is_sweep():
        _say(_name_run())
    try:
        return _run_job(composed)
    except EmberError as error:
        _say(str(error))
        return error.exit_code
    except OmegaConfBaseException as error:
        _say(_explain(error))
        return EXIT_CONFIG
    except BrokenPipeError:
        raise
    except Exception:  # noqa: BLE001  a sweep goes on with the next run
        return _report_bug()


def _name_run() -> str:
    run = HydraConfig.get()
    given = " ".join(text for text in run.overrides.task if not text.startswith("~"))
    return f"run {run.job.num + 1}: " + re.sub(r"\\([{}])", r"\1", given)  # as it was typed


def _run_job(composed: DictConfig) -> int:
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    config = config_module.build(plain)
    if _is_for_gpus(config):  # known once the settings are found valid
        config = config_module.build(plain, on_gpus=True)
    _configure_logging(config.log_level)
    job = importlib.import_module(f"ember_pp.jobs.{config.job.name}")
    code: int = job.run(config)
    return code


def _is_for_gpus(config: Config) -> bool:
    if config.job.name == "plan" and config.plan.devices != "auto":
        return any(device.kind != "cpu" for device in parse_devices(config.plan.devices))
    return takes_gpus(config.pipeline.devices)


def _configure_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {PROGRAM} %(levelname)s %(name)s: %(message)s")
    )
    logger = logging.getLogger("ember_pp")
    logger.handlers = [handler]  # one, however many runs a sweep has
    logger.setLevel(level.upper())
    logger.propagate = False


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


# --------------------------------------------------------------------------------------
# telling


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def _report_bug() -> int:
    traceback.print_exc()
    _say("this is a bug in ember-pp; docs/debugging.md says what to look at and to report")
    return EXIT_FAILED


def _print_version() -> None:
    print(f"{PROGRAM} {__version__}")


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return EXIT_OK
    return stop.code if isinstance(stop.code, int) else EXIT_FAILED


def _explain(error: Exception) -> str:
    """One clear line for an error of Hydra's or OmegaConf's."""
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error)
    if isinstance(error, MissingConfigException):
        return _explain_missing_file(error)
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _explain_unknown_key(found[1], error)
    if found := re.search(r"Ambiguous value for argument '([^=']+)=(.*?)'\n", text):
        key, values = found[1], found[2]
        return f"{key}: several values; a list is {key}=[{values}], one run for each is --multirun"
    if found := re.search(r"item is already at '([^']+)'", text):
        return f"+{found[1]}: there is such a setting; leave out the '+'"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(text)}"
    return _first_line(text)


def _explain_syntax(error: OverrideParseException) -> str:
    override = str(error.override)
    if "=" not in override:
        return f"{override}: expected key=value, e.g. job=batch; --help lists the most used"
    return f"{override}: {_first_line(str(error))}"


def _explain_missing_file(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
    options = sorted(error.options or [])
    if not group:
        return _first_line(str(error))
    listed = ", ".join(options)
    return f"{group}={name}: expected one of {listed}{suggest(name, options)}"


def _explain_unknown_key(key: str, error: Exception) -> str:
    known = config_module.dotted_keys()
    if key in known and key.startswith("job."):
        name = key.removeprefix("job.")
        owners = [
            job
            for job, settings in config_module.JOBS.items()
            if name in settings.__dataclass_fields__
        ]
        return f"{key}: a setting of job={', job='.join(owners)}, not of the job chosen"
    if key in known or key in {known_key.partition(".")[0] for known_key in known}:
        return f"{key}: {_first_line(str(error.__cause__ or error))}"
    groups = {known_key.partition(".")[0] for known_key in known}
    return f"{key}: no such setting{suggest(key, [*known, *groups])}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "unknown error")


if __name__ == "__main__":
    sys.exit(main())
