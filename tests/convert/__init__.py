"""Weights in and out: conversion, proof, inspection, security."""
