"""Autoencoders behind one interface: HunyuanVideo's, the video DC-AE and FLUX's of pictures. A folder's config.json says which it is."""
