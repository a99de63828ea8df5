"""The video DC-AE: 4x32x32 compression into 128 channels, a deterministic autoencoder of residual blocks and linear attention.

Written from hpcaitech/Open-Sora opensora/models/dc_ae (Apache-2.0, after MIT Han Lab's efficientvit), whose tensor names it keeps.
Every convolution is `convolution.Convolution`, every norm `norm.ChannelNorm`; places meet over all of space and time in one function alone,
`attention.keys_and_values`; the number of frames decides in `resampling.changes_time` alone. Splitting a clip over ranks exactly is a halo
in the first, a sum in the third and the whole clip's length in the fourth.
"""
