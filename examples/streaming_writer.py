"""An agent that passes the stream of a language model on, word by word.

Set MODEL_URL to any endpoint with OpenAI's chat completions, and MODEL_KEY if it wants one. Without MODEL_URL, a server
in this process takes the place of the model.

$ python examples/streaming_writer.py
A hub | brings | agents | together.
"""

import asyncio
import http.server
import json
import os
import threading
import urllib.request
from collections.abc import Iterator

from agenthub import Agent, LocalHub

agent = Agent("writer", max_tasks=4)


@agent.capability
def write(about: str) -> Iterator[str]:
    """Write a sentence. Each `yield` reaches the requester at once; the output is all of them together."""
    request = urllib.request.Request(
        f"{os.environ['MODEL_URL']}/v1/chat/completions",
        json.dumps(
            {
                "model": os.environ.get("MODEL", "gpt-5-mini"),
                "stream": True,
                "messages": [{"role": "user", "content": f"Write one sentence about {about}."}],
            }
        ).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('MODEL_KEY', 'none')}"},
    )
    with urllib.request.urlopen(request) as response:
        for line in response:  # Server-sent events: `data: {…}`, and `data: [DONE]` at the end.
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                yield json.loads(data)["choices"][0]["delta"].get("content") or ""


class StandIn(http.server.BaseHTTPRequestHandler):
    """Streams four words as a language model does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("A hub", " brings", " agents", " together."):
            event = {"choices": [{"delta": {"content": word}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            threading.Event().wait(0.2)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


async def main() -> None:
    async with LocalHub() as hub:
        agent.use_hub(hub)
        async with agent, Agent("reader", hub=hub) as me:
            separator = ""
            async for piece in me.stream("write", {"about": "hubs"}):
                print(separator + piece.strip(), end="", flush=True)
                separator = " | "
            print()


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    if "MODEL_URL" not in os.environ:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["MODEL_URL"] = f"http://127.0.0.1:{server.server_port}"
    asyncio.run(main())
    server.server_close()
