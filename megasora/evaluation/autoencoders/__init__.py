"""How well autoencoders keep clips, what that costs, and what their latents are like.

settings (what is asked) -> subjects (the weights) and clips -> measure (one clip) -> cells (what is finished) -> run -> summary -> report.
"""
