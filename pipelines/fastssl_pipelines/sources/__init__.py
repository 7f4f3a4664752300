"""Encoded images: finding, reading, decoding, checking and converting them."""
