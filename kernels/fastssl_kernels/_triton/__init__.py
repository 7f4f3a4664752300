"""Every Triton kernel of the package, and its launches: the only importer of triton."""
