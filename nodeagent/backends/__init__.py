from nodeagent.backends.selection import BACKENDS, select

__all__ = ["BACKENDS", "select"]
