"""`recap-fast serve`: a vLLM server for runs that attach to it, in the foreground."""

from __future__ import annotations

import logging
import socket

import torch

from recap_fast.config import TrainConfig
from recap_fast.data.images import load_image_encoder
from recap_fast.model.model_path import resolve_model
from recap_fast.model.precision import compute_dtype
from recap_fast.rollout.server_command import (
    KEY_VARIABLE,
    check_gpus,
    check_installed,
    is_loopback,
    server_command,
    server_environment,
    server_key,
)
from recap_fast.rollout.server_process import ServerProcess, new_key
from recap_fast.types import UserError

logger = logging.getLogger(__name__)


def serve(config: TrainConfig, host: str, port: int) -> int:
    """Runs the server that a configuration's runs attach to, until it ends or is interrupted.

    Args:
        host: the interface to listen on; others than loopback need a key.

    Returns:
        The server's exit status.

    Raises:
        UserError: no server of this configuration can run here.
    """
    host = host.strip("[]")  # of IPv6, as in a URL
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    given = server_key()
    if given is None and not is_loopback(url):
        raise UserError(
            f"--host {host} lets others reach routes that replace the model's weights: set a key "
            f"in the environment, here and where runs attach: export {KEY_VARIABLE}=$(openssl rand "
            f"-hex 32)"
        )
    _check_free(host, port)
    adapters = config.model.lora if config.rollout.server.adapters == "named" else None
    path = resolve_model(config.model.path)
    images = load_image_encoder(path, config.data)
    check_installed(takes_images=images is not None)
    settings = config.rollout
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    gpus = range(settings.tensor_parallel_size) if cuda else None
    if gpus is not None:
        check_gpus(gpus)
    command = server_command(
        settings,
        model_path=str(path),
        dtype=compute_dtype(settings.dtype, device),
        max_model_len=config.max_rollout_tokens,
        seed=config.seed,
        device=device,
        takes_images=images is not None,
        image_pixels=images.pixel_budget if images else None,
        host=host,
        port=port,
        adapter_rank=None if adapters is None else adapters.rank,
    )
    logger.info("serving %s at %s; attach with --set 'rollout.server.urls=[%s]'", path, url, url)
    key = given or new_key()
    if given is None:  # every user of this host reaches loopback
        logger.info("runs need its key, made for this start, in their environment:")
        print(f"export {KEY_VARIABLE}={key}", flush=True)  # in one line, to be copied
    environment = server_environment(key, gpus, takes_adapters=adapters is not None)
    process = ServerProcess(command, environment, log=None)
    try:
        return process.wait()
    finally:
        process.stop()


def _check_free(host: str, port: int) -> None:
    """Raises `UserError` where no server can listen: vLLM would say so once it has loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As vLLM does: connections of a server that has just ended do not hinder.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}; give another "
            f"--host or --port"
        ) from None
