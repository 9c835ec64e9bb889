"""Decoders on torchtune's modules, built and loaded from a Hugging Face folder."""
