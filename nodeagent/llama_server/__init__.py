"""Everything about llama-server: how it is started on a device, when it is ready, and how the agent talks to it.

`command_line` builds its argv and environment, `probe` asks whether it is ready, `relay` sends requests to it,
`stall_watch` finds servers that make no progress, and `saved_caches` keeps conversations across a switch of models.
`device_servers` joins these for one device, as what `scheduling` sees of it. `catalogue` knows the model files.
"""
