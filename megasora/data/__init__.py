"""Data (layer L2): manifest, sizes, the plan of a step, decoding. Takes encoders as a protocol; training wires them."""
