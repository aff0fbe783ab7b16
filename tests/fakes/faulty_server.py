#!/usr/bin/env python3
"""A llama-server with a fault: speaks its protocol up to the point where the fault shows.

faulty_server.py exit | never-ready | crash-on-chat | hang-on-chat | flood | flood-lines | torrent  [flags]

`torrent` answers with a stream of `max_tokens` events of 4 KiB, as fast as they are read.
"""

import http.server
import json
import os
import sys
import time
from contextlib import suppress


def main() -> None:
    behaviour, alias = sys.argv[1], sys.argv[sys.argv.index("-a") + 1]
    if behaviour == "exit":
        print("the last words", file=sys.stderr)
        raise SystemExit(3)
    if behaviour == "never-ready":
        print("loading for ever", file=sys.stderr, flush=True)
        time.sleep(3600)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(behaviour, alias))
    server.socket.listen(128)
    print(f"listening on http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
    server.serve_forever()


def handler(behaviour: str, alias: str) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            slots = [{"id_task": 1, "n_prompt_tokens_processed": 5, "next_token": [{"n_decoded": 0}]}]
            answers = {"/health": {"status": "ok"}, "/v1/models": {"data": [{"id": alias}]}, "/slots": slots}
            self._answer(answers[self.path])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if behaviour == "crash-on-chat":
                os._exit(9)
            if behaviour == "hang-on-chat":
                time.sleep(3600)
            if behaviour == "flood":
                for _ in range(1024):
                    os.write(2, b"x" * 2**20)
            if behaviour == "flood-lines":
                for _ in range(32):
                    os.write(2, b"a\n" * 2**13)
            if behaviour == "torrent":
                self._stream(json.loads(body)["max_tokens"])
            else:
                self._answer({"choices": [], "model": alias})

        def _stream(self, events: int) -> None:
            self.wfile.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            event = b"data: " + b"x" * 4096 + b"\n\n"
            with suppress(OSError):  # its client has left
                for _ in range(events):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

        def _answer(self, said: object) -> None:
            content = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return

    return Handler


if __name__ == "__main__":
    main()
