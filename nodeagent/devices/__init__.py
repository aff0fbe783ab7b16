"""The devices that can hold a server: which ones this host has, what was last measured on them, and how a server is
kept to one of them.

`backend` is the interface that each vendor implements (`cpu`, `cuda`), `selection` picks one of them, and `monitor`
reads the devices at intervals. `limits` is how much of the host this process may use. `values` is what the rest of the
agent knows of a device. Nothing here knows of HTTP, processes or scheduling.
"""
