"""megasora: Megatron-style 3D-parallel training, conversion and scaling of the Open-Sora 2.0 MMDiT."""

__version__ = "0.1.0"
