"""`pdbench emulate`: one SGLang-compatible worker without a model and without a GPU."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import stat
import sys
from pathlib import Path

import uvloop

from pdbench.emulate.config import WorkerConfig
from pdbench.emulate.handshake import Timeouts
from pdbench.emulate.server import CannotListenError, Server
from pdbench.model import profile
from pdbench.model.rates import Rates

log = logging.getLogger("pdbench.emulate")


class _BadArgumentError(ValueError):
    """An argument whose content cannot be used."""


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 0 after a clean stop, 1 for a taken port, 2 for bad arguments."""
    options = parser().parse_args(argv)
    try:
        config = _config(options)
    except ValueError as problem:
        print(f"pdbench emulate: {problem}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    log.info(
        "this is an EMULATOR (pdbench emulate), not SGLang: no model, no GPU, rates from profile %s (%s)",
        options.profile,
        config.profile.description,
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except CannotListenError as problem:
        print(f"pdbench emulate: {problem}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; tools/flag_table.py makes the table of flags from it."""
    made = argparse.ArgumentParser(
        prog="pdbench emulate",
        description="Serve as an SGLang prefill, decode or aggregated worker, without a model and without a GPU.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--role", required=True, choices=("prefill", "decode", "aggregated"))
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", required=True, type=_port)
    add(
        "--bootstrap-port",
        "--disaggregation-bootstrap-port",
        default=8998,
        type=_port,
        help="where a prefill worker meets decode workers (default: %(default)s)",
    )
    add("--profile", default="tiny", help=f"a YAML file, or one of: {', '.join(profile.shipped())} (default: tiny)")
    add("--node", default="localhost", help="host that it stands for: KV between workers of one host may go over NVLink")
    add("--rdma-fabric", default="none", choices=("infiniband", "roce", "none"), help="that of its host (default: %(default)s)")
    add(
        "--transfer-backend",
        "--disaggregation-transfer-backend",
        default="nixl",
        choices=("nixl", "mooncake", "mooncake_tcp"),
        help="with the two above, it decides how KV travels to each other worker (default: %(default)s)",
    )
    add("--model-path", default="emulated", help="name to report; nothing is loaded (default: %(default)s)")
    add("--served-model-name", help="name that clients use (default: the model path)")
    add("--tp-size", "--tensor-parallel-size", default=1, type=_count, help="GPUs of this worker (default: %(default)s)")
    add("--max-running-requests", type=_count, help="requests decoded together (default: the profile's)")
    add("--context-length", type=_count, help="tokens of prompt and output (default: the profile's)")
    add("--mem-fraction-static", type=_share, help="share of the GPU's memory for weights and KV cache (default: the profile's)")
    add("--max-total-tokens", type=_count, help="tokens of KV cache (default: what fits)")
    add("--chunked-prefill-size", type=_count, help="tokens of one prefill pass, at most (default: the profile's)")
    add("--num-reserved-decode-tokens", type=_count, help="room kept for every running request (default: the profile's)")
    add("--disable-radix-cache", action="store_true", help="no prefix cache (a decode worker never has one)")
    add("--enable-pd-role-switch", action="store_true", help="let /pd_role_switch change the role")
    add(
        "--allow-faults",
        action="store_true",
        help="let /emulated/fault break things: for tests of what watches over a deployment",
    )
    add("--api-key-file", type=Path, help="file of mode 0600 with the key that clients must send")
    add("--admin-api-key-file", type=Path, help="file of mode 0600 with the key for slow_down, profile, flush and the like")
    return made


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port between 1 and 65535")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, at most 1")
    return value


def _config(options: argparse.Namespace) -> WorkerConfig:
    figures = profile.load(options.profile)
    engine = figures.engine
    if options.role == "prefill" and options.port == options.bootstrap_port:
        raise _BadArgumentError(f"--port and --bootstrap-port are both {options.port}; they must differ")
    return WorkerConfig(
        role=options.role,
        host=options.host,
        port=options.port,
        bootstrap_port=options.bootstrap_port,
        profile=figures,
        model_path=options.model_path,
        served_model_name=options.served_model_name or options.model_path,
        tp_size=options.tp_size,
        max_running_requests=options.max_running_requests or engine.max_running_requests,
        context_length=options.context_length or figures.model.context_length,
        max_total_tokens=options.max_total_tokens or Rates(figures, options.tp_size).capacity_tokens(options.mem_fraction_static),
        timeouts=Timeouts.from_environment(),
        node=options.node,
        rdma_fabric=options.rdma_fabric,
        transfer_backend=options.transfer_backend,
        chunked_prefill_size=options.chunked_prefill_size or engine.chunked_prefill_tokens,
        num_reserved_decode_tokens=options.num_reserved_decode_tokens or engine.reserved_decode_tokens,
        disable_radix_cache=options.disable_radix_cache,
        enable_pd_role_switch=options.enable_pd_role_switch,
        allow_faults=options.allow_faults,
        api_key=_read_key("--api-key-file", options.api_key_file),
        admin_api_key=_read_key("--admin-api-key-file", options.admin_api_key_file),
    )


def _read_key(option: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise _BadArgumentError(f"{option} {path}: mode is {mode:04o}, others can read it; chmod 600 {path}")
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not text"
        raise _BadArgumentError(f"{option} {path}: {reason}") from None
    if not key:
        raise _BadArgumentError(f"{option} {path}: the file is empty")
    return key


async def _serve(config: WorkerConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = Server(config)
    starting, stopping = asyncio.ensure_future(server.start()), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What is there now stays; the collector would walk it again and again, and tokens would be late meanwhile.
            gc.collect()
            gc.freeze()
            # The young are looked at once, however many at a time: what has ended leaves no cycle behind that waits for more.
            gc.set_threshold(10_000, 500, 1000)
            log.info("ready: %s worker on %s:%d, model %s", config.role, config.host, config.port, config.model_path)
            await stopping
        else:
            starting.cancel()
        log.info("stopping")
    finally:
        stopping.cancel()
        await server.stop()
