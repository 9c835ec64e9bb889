"""Decoders built on torchtune's modules from a Hugging Face folder."""
