"""A server with the part of vLLM's API that `srppo.training.server` speaks, over our own sampler: a process of its own.

    python tests/stand_in.py MODEL [--port-file FILE] [--fault FAULT]

It follows what vLLM documents (docs.vllm.ai, OpenAI-compatible server, LoRA adapters at runtime, development mode): the
fields of requests and answers, and which are extensions. FAULT: how it misbehaves (`FAULTS`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = (
    "dies",  # in the middle of the third rollout
    "hangs",
    "stammers",  # 503 when it hears something for the first time
    "no-ids",  # an OpenAI server that is none of vLLM's
    "other-prompt",
    "other-model",
    "stale",  # weights are taken and not loaded
    "top-p",  # whatever is asked
    "cut",  # answers end before the limit
    "no-stop",  # the stop token is left out
    "no-lora",  # started without --enable-lora
    "forgets",  # an adapter that is to be unloaded is gone already
    "raw",  # log-probs before the temperature
    "foreign",  # a token beyond the tokenizer's
)


class Served:
    """The base, and the adapters over it, by name."""

    def __init__(self, path: str, fault: str | None) -> None:
        from srppo.config import ModelConfig
        from srppo.models.loading import load_model, load_tokenizer

        self.config = ModelConfig(base=path)
        self.tokenizer = load_tokenizer(path, self.config)
        self.base = load_model(path, self.config, vocab_size=len(self.tokenizer))
        self.path, self.fault = path, fault
        self.adapters: dict[str, Any] = {}
        self.first: Any = None
        self.lock = threading.Lock()
        self.calls = 0
        self.heard: set[str] = set()

    def completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        from srppo.training.rollout import generate

        model = self.adapters.get(asked["model"], self.base)
        temperature = asked["temperature"] or None
        wanted = {"top_k": max(asked["top_k"], 0), "top_p": 0.6 if self.fault == "top-p" else asked["top_p"]}
        limit = asked["max_tokens"] - (2 if self.fault == "cut" else 0)
        found = generate(
            model,
            [asked["prompt"]],
            stop_ids=asked["stop_token_ids"],
            pad_id=0,
            max_new_tokens=limit,
            seed=[asked["seed"]],
            temperature=temperature,
            **wanted,
        )
        (ids,), logprobs = found.responses(), found.sampled_logprobs_BT[0].tolist()
        if self.fault in ("top-p", "raw"):  # as raw log-probs are: of the whole distribution
            from srppo.training.scores import score_logprobs

            logprobs = score_logprobs(model, found)[0].tolist()
        ended = bool(found.ended_B[0])
        kept = ids[:-1] if ended and self.fault == "no-stop" else ids
        kept = [*kept[:-1], 10**6] if self.fault == "foreign" else kept
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.tokenizer.decode(kept),
            # as vLLM had it before 0.11.2: the limit is looked at before the stop token
            "finish_reason": "stop"
            if ended and (len(ids) < asked["max_tokens"] or self.fault == "no-stop")
            else "length",
            "logprobs": {"token_logprobs": logprobs[: len(kept)], "tokens": [str(i) for i in kept]},
        }
        if asked.get("return_token_ids") and self.fault != "no-ids":
            shown = [*asked["prompt"], 1] if self.fault == "other-prompt" else asked["prompt"]
            choice |= {"token_ids": kept, "prompt_token_ids": shown}
        name = "another" if self.fault == "other-model" else asked["model"]
        return {"id": "cmpl-0", "object": "text_completion", "model": name, "choices": [choice]}

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(status, body) of a POST."""
        from srppo.models.adapters import load_adapter
        from srppo.models.loading import load_model

        self.calls += 1
        if self.fault == "stammers" and (said := json.dumps([path, asked])) not in self.heard:
            self.heard.add(said)
            return 503, {"error": {"message": "overloaded"}}
        if path == "/v1/completions":
            if self.fault == "dies" and self.calls > 20:
                os._exit(9)
            if self.fault == "hangs":
                time.sleep(60)
            return 200, self.completion(asked)
        if path == "/v1/load_lora_adapter":
            if self.fault == "no-lora":
                return 404, {"detail": "Not Found"}
            if asked["lora_name"] in self.adapters:
                return 400, {"error": {"message": f"The lora adapter '{asked['lora_name']}' has already been loaded."}}
            found = self.first if self.fault == "stale" else None
            found = found or load_adapter(Path(asked["lora_path"]), self.base)
            self.first = self.first or found
            self.adapters[asked["lora_name"]] = found
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(asked["lora_name"], None)
            if self.fault == "forgets" or found is None:
                return 404, {"error": {"message": f"The lora adapter '{asked['lora_name']}' cannot be found."}}
            return 200, {}
        if path == "/collective_rpc":
            if self.fault != "stale":
                folder = asked["kwargs"]["weights_path"]
                self.base = load_model(folder, self.config, vocab_size=len(self.tokenizer))
            return 200, {"results": [None]}
        return (200, {}) if path == "/reset_prefix_cache" else (404, {"detail": "Not Found"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--fault", choices=FAULTS)
    options = parser.parse_args()
    served = Served(options.model, options.fault)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def say(self, status: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.say(200, {"object": "list", "data": [{"id": served.path, "object": "model"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:  # one after the other: our sampler has no queue
                self.say(*served.answer(self.path, asked))

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    written = options.port_file.with_suffix(".part")
    written.write_text(str(server.server_address[1]))
    written.rename(options.port_file)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
