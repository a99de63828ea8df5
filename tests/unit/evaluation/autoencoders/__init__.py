"""Tests of megasora/evaluation/autoencoders."""
