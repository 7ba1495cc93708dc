"""Lossless speculative decoding for vision-language models: targets, draft heads, policies and the one decode loop."""
