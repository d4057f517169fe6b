"""Pages of gradio for this machine alone.

Nothing is shared, recorded or reported, and nothing is loaded from elsewhere.
"""

import os
import secrets
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from goose_lora.apps.page_guard import KEY_BYTES, guarded_by
from goose_lora.errors import UserError

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
FIRST_PORT, LAST_PORT = 7860, 7959  # as gradio looks for a free one


def load_gradio() -> ModuleType:
    """Return the module gradio, its analytics off.

    Raises:
        UserError: it is not installed.
    """
    # It reads the variable as it is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            "the page needs gradio, which is not installed: pip install goose-lora[web]"
        ) from error
    return gradio


def require(port: int | None) -> None:
    """Raise UserError unless gradio is there and ``port``, if one is named, is free."""
    load_gradio()
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: a port is a number from 1 to 65535, such as {FIRST_PORT}.")
    with socket.socket() as probe:
        # One that was just given back counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            way_out = (
                f"Give another, or leave it out for the first free one from {FIRST_PORT} to {LAST_PORT}."
            )
            raise UserError(f"--port {port} cannot be had on {HOST}: {error.strerror}. {way_out}") from error


def open_page(blocks: "Blocks", *, port: int | None, css: str = "", head: str = "") -> str:
    """Serve ``blocks`` on the loopback address in a thread; return the address, with its key.

    The key is of this session: nobody is answered who has not opened that address.
    ``blocks.block_thread()`` waits for Ctrl-C.
    """
    gradio = load_gradio()
    # Gradio asks its own page whether it is there, which a proxy would look for on the network
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
    # Fonts of the machine: gradio's own come from the network
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    key = secrets.token_urlsafe(KEY_BYTES)
    _, address, _ = blocks.launch(
        server_name=HOST,
        server_port=port,
        # Nothing leaves the machine, and nothing is kept
        share=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        # Who is answered
        app_kwargs={"lifespan": guarded_by(key)},
        # Looks
        theme=theme,
        css=css,
        head=head,
        footer_links=[],
        # How it runs
        inbrowser=False,
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
    )
    return f"{address}?key={key}"


def serve(blocks: "Blocks", *, port: int | None, css: str = "", head: str = "") -> None:
    """Serve ``blocks``, print their address, and wait for Ctrl-C."""
    address = open_page(blocks, port=port, css=css, head=head)
    sys.stdout.write(f"On {address}, for this machine alone. Ctrl-C ends.\n")
    sys.stdout.flush()
    blocks.block_thread()
