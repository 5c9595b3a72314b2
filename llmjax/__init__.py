"""llmjax: the whole life of a large language model on JAX and TPUs."""

__version__ = "0.1.0"
