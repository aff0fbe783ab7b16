"""Reading the header of a model file (GGUF): whether the file is complete, and how much memory the model needs.

`file` knows the format, `header` what the metadata means. Whatever a file contains, the worst that comes of it is a
GgufError.
"""
