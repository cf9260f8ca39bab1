"""The command line: thin, no logic. Progress goes to stderr, results to stdout, errors to stderr with an exit code.

Heavy imports happen inside the commands, so that `tunery --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from tunery.cli_everyday import CONTEXT, JSON, doctor, print_json, runs, settings
from tunery.errors import NotInstalledError, TuneryError
from tunery.export.targets import FORMATS, TARGETS
from tunery.export.targets.base import ROWS
from tunery.scaffold import create, templates
from tunery.startup import collector_paused

_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, e.g. --set lora.rank=8. Repeatable.",
)
_QUIET = click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
_YES = click.option(
    "-y", "--yes", is_flag=True, help="Agree to what a hosted model is sent and costs; without it you are asked."
)
_DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|mps", help="Where the model answers."
)
_TASK = click.argument("task", required=False, type=click.Path(path_type=Path))
_MODEL = click.option(
    "--model", metavar="MODEL", help="The base: short for --set model=…; with --data, no TASK is needed."
)
_DATA = click.option(
    "--data", multiple=True, metavar="FILE", help="Rows to train on, instead of the task's. Repeatable."
)
_RUN = click.argument("run", type=click.Path(path_type=Path))


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="tunery", message="%(package)s %(version)s")
def cli() -> None:
    """Fine-tune a GPT-class language model with LoRA on this machine, with proof of what was trained.

    \b
    tunery init classify my-task        a folder to start from (tunery init --help lists others)
    tunery init --from rows.csv my-task    the same, written for your own rows
    tunery check my-task/task.yaml      look at the data before any compute
    tunery train my-task/task.yaml      train, evaluate, report
    tunery predict runs/my-task --data FILE --out FILE    its answers for every row of a file
    tunery runs                         all runs, with base, loss, accuracy and size; also: runs compare, runs prune
    tunery chat runs/my-task            talk to the result
    tunery export runs/my-task --to gguf    take it elsewhere, verified (also: merged, ollama, peft, hub)
    tunery settings                     every setting of a task file, in a line each; with a name, all about it
    tunery doctor                       this machine: versions, device, precision, memory, what is missing
    tunery serve --base MODEL           the OpenAI fine-tuning API, on this machine

    Exit codes: 0 done, 1 a bug of ours, 2 usage or configuration, 3 data, 4 checkpoint or adapter, 5 training diverged,
    69 a hosted service refuses or fails, 75 can be resumed, 130 interrupted, 143 terminated.
    """


def main() -> None:
    """Entry point: every error becomes one message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows has another encoding
            stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.exit(_guarded(lambda: cli.main(standalone_mode=False)))


def _guarded(work: Callable[[], object]) -> int:
    try:
        work()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TuneryError as error:
        _say(f"tunery: {error}")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("tunery: interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone, e.g. `tunery check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("TUNERY_DEBUG"):
            raise
        _say(
            f"tunery: this is a bug in tunery: {type(error).__name__}: {error}\n"
            "  → run again with TUNERY_DEBUG=1 for the details, and please report them"
        )
        return 1


def _require(extra: str, packages: Sequence[str]) -> None:
    """Refuse a command whose packages are not installed."""
    from tunery.versions import install_command

    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise NotInstalledError(
            f"tunery {extra} needs packages that are not installed: {', '.join(missing)}",
            install_command(extra),
        )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _print(text: str) -> None:
    click.echo(text)


def _consent(yes: bool) -> Callable[[Sequence[str]], bool | None]:
    """How a person agrees to what is sent elsewhere; None is given where nobody can be asked."""

    def asked(sentences: Sequence[str]) -> bool | None:
        if not yes and not sys.stdin.isatty():
            return None
        for sentence in sentences:
            _say(sentence)
        return yes or click.confirm("Send it?", err=True)

    return asked


def _given(*, model: str | None, data: tuple[str, ...]) -> dict[str, Any]:
    """Settings that have an option of their own, where it was used."""
    files = data if len(data) > 1 else data[0] if data else None
    return {name: value for name, value in (("model", model), ("data", files)) if value is not None}


@cli.command()
@click.argument("template", required=False, metavar=f"[{'|'.join(templates())}]")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option(
    "--from", "source", metavar="FILE", help="Your own rows: the task is written for them, no template needed."
)
@click.option("--model", metavar="MODEL", help="With --from: the base.  [default: smollm2-135m-instruct]")
def init(template: str | None, folder: Path | None, source: str | None, model: str | None) -> None:
    """Make a FOLDER with a commented task.yaml: of a template, with rows to replace, or for your own FILE.

    \b
    tunery init classify my-task
    tunery init --from reviews.csv my-task    (the folder left out: ./reviews)
    """
    if source is None:
        if template is None or folder is None:
            raise click.UsageError(
                "name a template and a folder (tunery init classify my-task), or rows with --from FILE"
            )
        written = create(template, folder)
    else:
        if folder is not None:
            raise click.UsageError("with --from only a folder is named, and no template")
        from tunery.drafting import draft

        written, notes = draft(source, template, model)
        for note in notes:
            _say(note)
    for path in written:
        _print(f"wrote {path}")
    _print(f"{'Next' if source else 'Put your rows in, then'}: tunery check {written[0].parent / 'task.yaml'}")


@cli.command()
@_TASK
@_MODEL
@_DATA
@_SET
@JSON
@_QUIET
@click.option("--samples", default=3, show_default=True, help="Rows to show with their trained tokens coloured.")
@click.option("--lr-test", is_flag=True, help="Also run a short learning-rate range test and suggest a rate.")
@click.option("--lr-steps", default=40, show_default=True, type=click.IntRange(8), help="Steps of that test.")
@click.option(
    "--for",
    "destinations",
    multiple=True,
    metavar="DESTINATION",
    help="Also say what a destination would refuse: peft, merged, vllm, gguf, gguf-adapter, ollama, hub. Repeatable.",
)
def check(
    task: Path | None,
    model: str | None,
    data: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    samples: int,
    lr_test: bool,
    lr_steps: int,
    destinations: tuple[str, ...],
) -> None:
    """Show everything about a TASK's data, and what will be trained, before any compute."""
    with collector_paused(freeze=True):
        from tunery import api, show
    from tunery.console import Console

    given = _given(model=model, data=data)
    report = api.check(task, overrides, samples=samples, progress=Console(quiet=quiet), **given)
    result = report.as_json()
    findings = []
    if destinations:
        from tunery.export.destinations import check_destinations

        findings = check_destinations(task, destinations, overrides, **given)
        result["destinations"] = [finding.as_dict() for finding in findings]
    curve = None
    if lr_test:
        curve = api.learning_rate_test(task, overrides, steps=lr_steps, progress=Console(quiet=quiet), **given)
        result["learning_rate_test"] = {"rates": curve.rates, "losses": curve.losses, "suggestion": curve.suggestion}
    if as_json:
        print_json(result)
        return
    show.check(report)
    if destinations:
        show.destinations(destinations, findings)
    if curve is not None:
        _print(f"\nLearning-rate range test (loss upwards, rate to the right):\n{curve.draw()}")
        _print(f"Suggested: --set train.learning_rate={curve.suggestion:g} ({curve.reason})")


@cli.command()
@_TASK
@_MODEL
@_DATA
@_SET
@JSON
@_QUIET
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH|JOB",
    help="Go on from the last checkpoint, start over (an earlier run is kept under another name), or name one; of a "
    "hosted model, its job.",
)
@click.option("--seed", type=click.IntRange(0), help="Short for --set seed=N.")
@_YES
@click.option("--cancel", is_flag=True, help="Cancel the job of a hosted model instead.")
def train(
    task: Path | None,
    model: str | None,
    data: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    resume: str,
    seed: int | None,
    yes: bool,
    cancel: bool,
) -> None:
    """Train a TASK, compare base and tuned model, and write a report.

    Without a task file: tunery train --model MODEL --data FILE. The run directory then holds one that does the same.
    """
    with collector_paused(freeze=True):
        from tunery import api, show
    from tunery.console import Console

    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    given = _given(model=model, data=data)
    if cancel:
        _print(api.cancel(task, overrides, progress=Console(quiet=quiet), **given))
        return
    run = api.train(task, overrides, resume=resume, progress=Console(quiet=quiet), consent=_consent(yes), **given)
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "receipt": run.receipt.as_json(),
                "evaluation": run.evaluation and run.evaluation.as_json(),
            }
        )
    else:
        show.run(run)


@cli.command(name="eval")
@_RUN
@JSON
@_QUIET
@click.option("--data", type=click.Path(path_type=Path), help="A file of further rows instead of the held-out ones.")
@_YES
def eval_(run: Path, as_json: bool, quiet: bool, data: Path | None, yes: bool) -> None:
    """Measure base vs. tuned model of a RUN again, or on other rows."""
    with collector_paused(freeze=True):
        from tunery import api, show
    from tunery.console import Console

    result = api.evaluate(run, data, progress=Console(quiet=quiet), consent=_consent(yes))
    if as_json:
        print_json(result.as_json())
    else:
        show.evaluation(result)


@cli.command()
@click.argument("source", required=False, metavar="[JOB|MODEL|FOLDER]")
@click.option("--to", metavar="MODEL", help="The base to train here.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for everything; left out, runs/ and the job.")
@click.option("--capture-only", is_flag=True, help="Save rows, settings and answers now; train later, from the folder.")
@click.option("--rows", default=200, show_default=True, type=click.IntRange(1), help="Held-out rows to ask at most.")
@click.option("--files", "training", type=click.Path(path_type=Path), help="Your own copy of the training rows.")
@click.option("--validation", type=click.Path(path_type=Path), help="Your own copy of the validation rows.")
@click.option("--answers", type=click.Path(path_type=Path), help="Your own record of the tuned model's answers.")
@click.option("--base-url", help="Address of the API; left out, OPENAI_BASE_URL or OpenAI's own.")
@click.option("--key-variable", default="OPENAI_API_KEY", show_default=True, help="Environment variable with the key.")
@click.option("--prices", type=click.Path(path_type=Path), help="File of prices.")
@_YES
@_SET
@JSON
@_QUIET
def migrate(
    source: str | None,
    to: str | None,
    out: Path | None,
    capture_only: bool,
    rows: int,
    training: Path | None,
    validation: Path | None,
    answers: Path | None,
    base_url: str | None,
    key_variable: str,
    prices: Path | None,
    yes: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Move a model that was tuned on OpenAI's API here, and put both side by side.

    Give the job (ftjob-…), the model it made (ft:…), or a folder captured earlier; or only --files.
    """
    with collector_paused(freeze=True):
        from tunery import moving, show
    from tunery.console import Console

    files = {name: path for name, path in (("training", training), ("validation", validation)) if path is not None}
    done = moving.migrate(
        source,
        to,
        out=out,
        files=files,
        answers=answers,
        rows=rows,
        capture_only=capture_only,
        overrides=overrides,
        hosted=moving.hosted_config(base_url, key_variable, prices),
        progress=Console(quiet=quiet),
        consent=_consent(yes),
    )
    if as_json:
        print_json(done.as_json())
    else:
        show.migration(done)


@cli.command()
@_RUN
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="Rows in the form of the task, with or without their answers; - for standard input (JSON lines or CSV).",
)
@click.option("--out", required=True, metavar="FILE", help="A .jsonl or .csv file; - for JSON lines on stdout.")
@click.option(
    "--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer that is written."
)
@click.option("--overwrite", is_flag=True, help="Replace the file of --out.")
@_DEVICE
@JSON
@_QUIET
def predict(
    run: Path, data: str, out: str, max_new_tokens: int, overwrite: bool, device: str, as_json: bool, quiet: bool
) -> None:
    """Write what a RUN's model answers for every row of a file.

    Interrupted, the same command resumes. Rows without a prediction (too long) end in exit code 3, after all others are
    written.
    """
    with collector_paused(freeze=True):
        from tunery import api, show
    from tunery.console import Console

    if as_json and out == "-":
        raise click.UsageError("--json prints the result on stdout, where --out - already prints the predictions")
    done = api.predict(
        run,
        data,
        out,
        max_new_tokens=max_new_tokens,
        overwrite=overwrite,
        device=device,
        progress=Console(quiet=quiet),
    )
    if as_json:
        print_json(done.as_json())
    else:
        show.predictions(done)


@cli.command()
@_RUN
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: always the likeliest token."
)
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--system", help="System message of the conversation.")
def chat(run: Path, max_new_tokens: int, temperature: float, top_p: float, system: str | None) -> None:
    """Talk to a RUN's model; /base, /tuned and /both switch sides."""
    with collector_paused(freeze=True):
        from tunery import api
    from tunery.evaluation.chat import Conversation

    tuned = api.load(run)
    Conversation(
        tuned, system=system, sampling={"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    ).run()


@cli.command()
@_RUN
@click.option(
    "--to",
    required=True,
    metavar="|".join(FORMATS),
    type=click.Choice(list(FORMATS)),
    help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()) + ".",
)
@click.option(
    "--quantize",
    metavar="TYPE",
    help="Dtype of a GGUF file: f32, f16 (gguf's default), bf16, q8_0 (ollama's default), q6_k, q5_k_m, q5_1, "
    "q5_0, q4_k_m, q4_1, q4_0, q3_k_m.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Its folder; left out, RUN/export/FORMAT.")
@click.option("--rows", default=ROWS, show_default=True, type=click.IntRange(1), help="Held-out rows to compare.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|mps",
    help="Where models are compared; auto takes the CPU where a GPU has too little memory.",
)
@click.option("--repo", metavar="OWNER/NAME", help="hub: the repository; made if it is not there.")
@click.option(
    "--content",
    type=click.Choice(list(TARGETS)),
    help="hub: which format to upload; left out, peft.",
)
@click.option("--public", is_flag=True, help="hub: a repository made now can be seen by everybody.")
@click.option("--dry-run", is_flag=True, help="hub: export, and only say what would be uploaded.")
@JSON
@_QUIET
def export(
    run: Path,
    to: str,
    quantize: str | None,
    out: Path | None,
    rows: int,
    device: str,
    repo: str | None,
    content: str | None,
    public: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export a RUN, load the export back, and compare it with the adapter on held-out rows.

    An export that differs by more than its format's limits fails with exit code 4, and nothing of it stays.
    """
    with collector_paused(freeze=True):
        from tunery import show
        from tunery.export.export_run import export_run
    from tunery.console import Console

    done = export_run(
        run,
        to,
        quantize=quantize,
        out=out,
        rows=rows,
        device=device,
        repo=repo,
        content=content,
        private=not public,
        dry_run=dry_run,
        progress=Console(quiet=quiet),
    )
    if as_json:
        print_json({"path": str(done.path), "export": done.record.as_json(), "upload": done.upload})
    else:
        show.export(done)


@cli.command()
@click.option(
    "--base",
    "bases",
    multiple=True,
    required=True,
    metavar="MODEL",
    help="A model to answer and to train, named as in a task file. Repeatable; the first is loaded at the start.",
)
@click.option("--alias", "aliases", multiple=True, metavar="NAME=MODEL", help="Another name of a base. Repeatable.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=RUN",
    help="A run directory, or an adapter folder, to answer under NAME. Repeatable.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Any other than loopback needs keys in TUNERY_API_KEYS."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--home",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where files, jobs and models are kept.  [default: $TUNERY_HOME or ~/.local/share/tunery]",
)
@click.option("--slots", default=1, show_default=True, type=click.IntRange(1), help="Jobs trained at the same time.")
@click.option("--engine", metavar="URL", help="A vLLM or llama.cpp server that answers instead of this process.")
@click.option("--engine-kind", type=click.Choice(["vllm", "llamacpp"]), help="Left out, it is found out.")
@click.option(
    "--task-defaults",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Settings for all jobs: sections of a task file, such as lora and train.",
)
@click.option("--max-rows", default=64, show_default=True, type=click.IntRange(1), help="Answers made at a time.")
@click.option("--max-queue", default=256, show_default=True, type=click.IntRange(0), help="Requests that may wait.")
@click.option("--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="A further Host name. Repeatable.")
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page's origin that may use the API from a browser. Repeatable.",
)
@click.option("--upload-limit", default=512, show_default=True, type=click.IntRange(1), help="Megabytes of one file.")
def serve(task_defaults: Path | None, upload_limit: int, home: Path | None, **given: Any) -> None:
    """Speak OpenAI's fine-tuning API on this machine, and serve a page for it. Scripts find it by OPENAI_BASE_URL."""
    _require("serve", ("fastapi", "uvicorn", "python_multipart", "llguidance"))
    with collector_paused(freeze=True):
        from tunery.serve import app
        from tunery.serve import server_settings as settings

    for option in ("aliases", "adapters"):
        given[option] = settings.named(given[option], option)
    if home is not None:
        given["home"] = home
    if task_defaults is not None:
        given["task_defaults"] = settings.read_task_defaults(task_defaults)
    app.run(
        settings.make_settings(
            upload_limit=upload_limit * settings.MEGABYTE, api_keys=settings.keys_from_environment(), **given
        )
    )


for command in (runs, settings, doctor):
    cli.add_command(command)


if __name__ == "__main__":
    main()
