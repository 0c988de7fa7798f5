"""`pagoda serve` with several models, or with an upstream: plans what fits, and starts the gateway in front of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace

from pagoda import __version__
from pagoda.api.http.listen import allow_many_files, bind_socket
from pagoda.api.notify import Notifier
from pagoda.api.serving.blobs import BlobStore
from pagoda.cli.address import address, is_loopback, print_notes
from pagoda.cli.model import local_model
from pagoda.cli.screen import size, table
from pagoda.deploy.download.created import BLOBS
from pagoda.deploy.download.default_model import NAME, cache_path
from pagoda.errors import ConfigError
from pagoda.gateway.run import run_gateway
from pagoda.gateway.sizes import Sized, budget_bytes, machine_here, sized
from pagoda.gateway.upstream import Upstream
from pagoda.gateway.wire import Place, place_of
from pagoda.observe import setup_logging
from pagoda.options.config import Options
from pagoda.options.resolve import Settings

KEY_VARIABLE = "PAGODA_UPSTREAM_API_KEY"


def serve_models(settings: Settings, models: Sequence[Options]) -> int:
    """One port for all of them. The result is the exit code."""
    options = settings.options
    setup_logging(options.log_level, options.log_file, options.log_file_size, options.log_file_count)
    allow_many_files()
    upstream = _upstream(options)
    with bind_socket(options.host, options.port, options.uds) as listener:
        print_notes(settings)
        _check_names(models)
        machine = machine_here(options)
        found = sized([(_own(each, number), local_model(each)) for number, each in enumerate(models)], machine)

        def ready() -> None:
            first = "loading" if options.fallback else "loaded"
            print(_welcome(found, first, upstream, address(options, listener)), flush=True)

        return run_gateway(
            options,
            found,
            budget_bytes(options, machine),
            upstream,
            cache_path() / "derived",
            BlobStore(cache_path() / BLOBS),
            listener,
            version=__version__,
            local=options.uds is None and is_loopback(options.host),
            on_ready=ready,
            notifier=Notifier(os.environ),
        )


def _own(options: Options, number: int) -> Options:
    """Files and batches are kept for the first model; each one has a name."""
    names = options.served_model_name or (options.model or NAME,)
    return replace(options, served_model_name=names, files_dir=options.files_dir if number == 0 else None)


def _check_names(models: Sequence[Options]) -> None:
    names = [name for each in models for name in each.served_model_name or (each.model or NAME,)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"Two models have the name {twice}", remedy="Give each one of its own: --served-model-name A B"
        )


def _upstream(options: Options) -> Upstream | None:
    if options.upstream is None:
        if options.fallback or options.fallback_model:
            raise ConfigError("--fallback needs another server", remedy="Name it: --upstream http://host:11434")
        return None
    place = place_of(options.upstream, "--upstream")
    if _is_ours(place, options):
        raise ConfigError(
            f"--upstream {options.upstream} is this server itself", remedy="Name another server, or another --port"
        )
    return Upstream(place, os.environ.get(KEY_VARIABLE, ""))


def _is_ours(place: Place, options: Options) -> bool:
    if options.uds is not None or place.port != options.port:
        return False
    return is_loopback(place.host) or place.host in (options.host, socket.gethostname())


def _welcome(models: Sequence[Sized], first: str, upstream: Upstream | None, url: str) -> str:
    """What is printed when requests are taken."""
    rows = [
        (
            ", ".join(each.options.served_model_name),
            f"{size(each.need_bytes)}, {each.context} tokens of context, {when}",
        )
        for each, when in zip(models, (first, *["loaded on demand"] * (len(models) - 1)), strict=True)
    ]
    if upstream is not None:
        rows.append(("all others", f"by {upstream.place}"))
    target = f"--unix-socket {url[5:]} http://localhost" if url.startswith("unix:") else url
    lines = [f"\n{table(rows)}", f"\n  {url}/v1 answers now, Ctrl-C stops it. Try:", f"\n  curl {target}/v1/models\n"]
    return "\n".join(lines)
