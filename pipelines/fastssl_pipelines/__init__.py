"""Views of images, fast: one contract, several engines. Needs torch and numpy; each engine brings its own library."""

from fastssl_pipelines.spec import Batch, Pipeline, View

__all__ = ["Batch", "Pipeline", "View"]
