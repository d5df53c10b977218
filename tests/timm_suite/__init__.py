"""timm's own model tests, run on the names that visionsel registers.

    python -m tests.timm_suite [arguments of pytest]

The tests are taken from the source release of the installed timm (or from the checkout that `TIMM_SOURCE`
names), never kept here. `plugin.py` narrows them to our models.
"""
