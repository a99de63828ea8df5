"""Tests of megasora/evaluation."""
