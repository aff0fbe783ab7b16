"""What the agent has imported when it is ready: an import that creeps back costs each start time and memory."""

import json
import subprocess
import sys
from pathlib import Path

from fakes.agent_process import write_config

# What a node needs only for ordinary requests, HTTP/2, a dispatcher, a GPU, or other commands.
HEAVY = ["asyncio", "flask", "h2", "httpx", "hypercorn", "jinja2", "pynvml", "quart", "quart_trio", "werkzeug"]

AGENT = """
import json, sys, threading, urllib.request
from pathlib import Path
from nodeagent.cli.main import _run_daemon
from nodeagent.config import load_config

def ask(url, body=None):
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status

def use(base_url):
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 2}).encode()
    statuses = [ask(base_url + "/livez"), ask(base_url + "/readyz"), ask(base_url + "/v1/completions", body)]
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    statuses.append(ask(base_url + "/v1/models"))
    print(json.dumps({"statuses": statuses, "heavy": heavy, "later": "quart" in sys.modules}), flush=True)
    import os, signal
    os.kill(os.getpid(), signal.SIGTERM)

def on_ready(base_url):
    threading.Thread(target=use, args=[base_url]).start()

sys.exit(_run_daemon(load_config(Path(sys.argv[1])), on_ready=on_ready))
"""


def test_what_inference_and_health_do_not_need_is_not_imported_before_it_is(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, llama_server, [{"model_id": "tiny", "path": str(tiny_model)}])
    argv = [sys.executable, "-c", AGENT, str(config), json.dumps(HEAVY)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"statuses": [200] * 4, "heavy": [], "later": True}
