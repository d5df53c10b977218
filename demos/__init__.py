"""Demos for the browser: `visionsel demo`, or `python -m demos.app`.

Three tabs, each a file and an app of its own: `grounding` (what does each word of an answer look at?),
`pruning` (what is lost with fewer image tokens?) and `hallucination` (what stops a model from inventing?).
They need the extra "demo" and open no connection but the one that they serve.
"""
