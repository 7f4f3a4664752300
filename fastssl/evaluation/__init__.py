"""How good frozen features are: probes, protocols, spectra; during a run and after it."""
