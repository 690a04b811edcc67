"""A port of its own for one replica's metrics, for scrapers that look at pods (option metrics_port)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tpqwen.errors import ConfigError
from tpqwen.metrics import CONTENT_TYPE


class Exporter:
    """Answers GET /metrics with `text()`, from threads of its own, until closed.

    Nothing else is served and nothing is asked of the caller: expose the port to Prometheus only. port 0 takes a free
    one; `port` says which it is. Raises ConfigError when the port is taken.
    """

    def __init__(self, text: Callable[[], str], port: int, host: str = "127.0.0.1") -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                known = self.path.partition("?")[0] == "/metrics"
                body = text().encode() if known else b"only /metrics is served here\n"
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", CONTENT_TYPE if known else "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not worth a line each."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}, metrics_port {port}: {error.strerror}") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
