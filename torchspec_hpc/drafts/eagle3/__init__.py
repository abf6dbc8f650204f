"""EAGLE-3 (https://arxiv.org/abs/2503.01840), Llama type."""
