"""Models with interventions in other people's evaluation harnesses: one file a harness.

Each file needs its harness and says so when it is missing; none is a dependency of visionsel.
"""
