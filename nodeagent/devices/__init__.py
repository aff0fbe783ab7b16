"""The devices that can hold a server: which ones this host has, what was last measured on them, and how a server is
kept to one of them.

`backend` is the interface to the devices of one kind (`cpu`, `cuda`, `listed` for all others), `selection` picks one,
`cards` is the interface to what a vendor's driver measures (`nvidia_cards`, `amdgpu`, `intel`, `apple`), and `monitor`
reads the devices at intervals. `limits` is how much of the host this process may use. `values` is what the rest of the
agent knows of a device. Nothing here knows of HTTP, children or scheduling.
"""
