"""Published SAEs of language models, which pipelines carry as text encoders: one file a layout."""
