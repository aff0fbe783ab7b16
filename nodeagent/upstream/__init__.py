"""llama-server's HTTP dialect: asking whether it is ready, and relaying requests to it."""

from nodeagent.upstream.connection import Answer, Upstream, is_loading_answer
from nodeagent.upstream.control import control_client
from nodeagent.upstream.headers import forwardable
from nodeagent.upstream.probe import LlamaServerProbe

__all__ = ["Answer", "LlamaServerProbe", "Upstream", "control_client", "forwardable", "is_loading_answer"]
