"""Reading the header of a model file (GGUF): whether the file is complete, and how much memory the model needs.

`file` knows the format, `metadata`, `header` and `cache_shape` what is in it, and `memory` what follows from that.
Whatever a file contains, the worst that comes of it is a GgufError.
"""
