"""Evaluation of frozen features, during a run and after it: probes, protocols, spectra."""
